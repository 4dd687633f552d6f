"""A run's files while it trains: the rows of its log, which trackers show too, and its checkpoints."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import broadcast_object_list

from fmdistill import stop
from fmdistill.distill import checkpoint
from fmdistill.distill.checkpoint import Contents
from fmdistill.distill.guards import LARGEST
from fmdistill.distill.state import TrainingState
from fmdistill.distill.trackers import Trackers
from fmdistill.files import write_whole
from fmdistill.logs import JsonLines, read_json_lines
from fmdistill.recipe import VALIDATION, Recipe
from fmdistill.registry import UserError

BEST = "best.json"  # beside the checkpoints: which one is the best, and its value


@dataclass
class RunFiles:
    """The files of a run. Only the first process writes."""

    recipe: Recipe
    state: TrainingState
    order: str  # identity of the order of the training images
    writes: bool
    saved: int = field(default=0, init=False)  # step of the newest checkpoint
    best: tuple[float, int] | None = field(default=None, init=False)  # the smallest value of `train.best`, and its step

    def __post_init__(self) -> None:
        self.run, self.metric = Path(self.recipe.out), self.recipe.train.best
        self.trackers = Trackers(self.recipe)

    @property
    def rows(self) -> JsonLines:
        """Return the log."""
        return JsonLines(self.run / "metrics.jsonl")

    def resume(self) -> int:
        """Load the newest checkpoint that is not damaged; return its step, or 0 if there is none.

        Raises UserError if it does not fit, or if the images' order differs, since its step would mean another batch.
        """
        chosen = [checkpoint.newest_whole(self.run) if self.writes else None]
        folder = broadcast_object_list(chosen)[0]
        if folder is not None:
            contents = checkpoint.read(folder)
            self._load(folder, contents)
            self.saved = int(contents.state["step"])
        return self.saved

    def _load(self, folder: Path, contents: Contents) -> None:
        if contents.state.get("order") != self.order:
            raise UserError(
                f"{folder}: the training images have changed since, so their order differs; "
                f"use the images that the run began with, or choose another out=FOLDER"
            )
        try:
            self.state.load(contents)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder}: does not fit this recipe ({str(error).splitlines()[0]}); delete the folder to use an "
                f"earlier checkpoint, or choose another out=FOLDER"
            ) from None

    def begin(self) -> None:
        """Delete the rows logged after the newest checkpoint, whose steps are done again, and open the trackers."""
        if not self.writes:
            return
        self.rows.truncate_after(self.saved)
        kept = checkpoint.steps(self.run)
        for row in read_json_lines(self.rows.path):
            if row.get("step") in kept:
                self._compare(row["step"], row)
        self._write_best()
        self.trackers.open(self.saved)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Append a row to the log and show it in the trackers, unless it is empty."""
        if self.writes and row:
            self.rows.write({"step": step, **row})
            self.trackers.write(step, row)

    def validated(self) -> bool:
        """Return whether the validation losses of the newest checkpoint's step are logged."""
        logged = read_json_lines(self.rows.path)
        return any(name.startswith(VALIDATION) for row in logged if row.get("step") == self.saved for name in row)

    def judge(self, step: int, validate: Callable[[], Mapping[str, float]]) -> None:
        """Append the losses of a validation, of the average if there is one; save a checkpoint if they are the best."""
        with self.saving_if_stopped(step):
            with self.state.averaged():
                row = validate()
            self.write(step, row)
            if self.writes and self._compare(step, row):
                self.save(step)
                self._write_best()

    def _write_best(self) -> None:
        path = self.run / "checkpoints" / BEST
        if self.best is None:
            path.unlink(missing_ok=True)
        else:
            value, step = self.best
            value = -value if self.metric in LARGEST else value
            write_whole(path, json.dumps({"step": step, self.metric: value}))

    def _compare(self, step: int, row: Mapping[str, float]) -> bool:
        """Remember the step if its row is the best so far; return whether it is."""
        value = row.get(self.metric or "", math.nan)
        value = -value if self.metric in LARGEST else value
        if not math.isfinite(value) or self.best is not None and value >= self.best[0]:
            return False
        self.best = value, step
        return True

    def save_if_sound(self, step: int) -> None:
        """Write a checkpoint, unless steps are being skipped: these may go on, and it would replace a sound one."""
        self.state.finite.settle()
        if not self.state.finite.in_a_row:
            self.save(step)

    def save(self, step: int) -> None:
        """Write a checkpoint, unless that step has one, and delete older ones."""
        if not self.writes or step <= self.saved:
            return
        self.state.finite.settle()
        tensors, state = self.state.contents()
        checkpoint.save(self.run, step, Contents(tensors, {"order": self.order, **state}))
        self.saved = step
        checkpoint.remove_old(self.run, self.recipe.train.keep, self.best and self.best[1])

    def close(self) -> None:
        """Close the trackers."""
        self.trackers.close()

    @contextmanager
    def saving_if_stopped(self, step: int, undo: bool = False) -> Iterator[None]:
        """Save the checkpoint of `step` if a stop request ends the block.

        With `undo`, the block is the forward and backward passes of the step after it, whose effects are undone.
        """
        try:
            yield
        except stop.Stopped:
            if undo:
                self.state.finite.undo()
            self.save(step)
            raise
