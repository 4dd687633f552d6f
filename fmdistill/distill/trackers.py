"""Show a run's log in TensorBoard and Weights & Biases, by accelerate's trackers."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.settings import flat


def check_installed(names: list[Any]) -> None:
    """Raise a UserError if the package of one of `train.trackers` is missing."""
    try:
        if "tensorboard" in names:
            import tensorboard  # type: ignore[import-not-found]  # noqa: F401
        if "wandb" in names:
            import wandb  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        raise UserError(
            f"train.trackers=[{', '.join(names)}]: {name} is missing; pip install 'fmdistill[trackers]', or take it "
            f"out of train.trackers"
        ) from error


class Trackers:
    """The trackers that a recipe names. TensorBoard's files are in the run's folder `tensorboard`.

    In Weights & Biases the run belongs to the project "fmdistill" and is continued by the same recipe and folder; where
    it is written to, and whether it is at all, is decided by that program's own variables, such as WANDB_MODE.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._open = recipe, []
        check_installed(recipe.train.trackers)

    def open(self, saved: int) -> None:
        """Open the trackers, for rows of steps after `saved`. Raises UserError if one does not start."""
        recipe, run = self._recipe, Path(self._recipe.out)
        if not recipe.train.trackers:
            return
        name = hashlib.sha256(f"{run.absolute()}".encode()).hexdigest()[:8]
        wandb = {"name": run.name, "id": f"{run.name}-{name}", "resume": "allow", "dir": str(run)}
        arguments = {
            "tensorboard": {"run_name": "tensorboard", "logging_dir": str(run), "purge_step": saved + 1},
            "wandb": {"run_name": "fmdistill", **wandb, "config": flat(dataclasses.asdict(recipe))},
        }
        for tracker in recipe.train.trackers:
            try:
                opened: GeneralTracker = LOGGER_TYPE_TO_CLASS[tracker](**arguments[tracker])
                if hasattr(opened, "start"):  # older versions of accelerate start it when it is built
                    opened.start()
            except Exception as error:  # of a kind of its own, such as that nobody is logged in
                raise UserError(
                    f"train.trackers: {tracker} did not start ({' '.join(str(error).split())}); correct that, or take "
                    f"it out of train.trackers"
                ) from error
            self._open.append(opened)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Show a row of the log."""
        for tracker in self._open:
            tracker.log(dict(row), step=step)

    def close(self) -> None:
        """Close the trackers; they may be closed already."""
        while self._open:
            self._open.pop().finish()
