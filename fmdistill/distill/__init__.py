"""The distil stage: shards -> student -> checkpoint. `run` resumes exactly where a killed run stopped."""

import dataclasses
import os
import re
from itertools import accumulate
from pathlib import Path

from torch import nn

from fmdistill import recipe as recipes
from fmdistill.backbones.device import pick_device
from fmdistill.cache import finished
from fmdistill.distill import checkpoint, tasks
from fmdistill.distill import student as students
from fmdistill.distill.student import WEIGHTS, load_student
from fmdistill.distill.train import Engine, fit, validator
from fmdistill.launcher import check_training
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.settings import flat
from fmdistill.several import by_teacher

__all__ = ["check_claim", "check_machine", "check_run", "load_student", "run"]

# Settings that may change in a resumed run, in addition to the fields that the recipe marks: the cache's manifest
# stores the hash of the weights, and the others do not change what the teacher computes.
FREE = {f"teacher.{key}" for key in ("weights", "device", "batch", "workers")}


def run(recipe: Recipe, resume: bool = True) -> Path:
    """Train the recipe's student and return the run's directory.

    With `resume`, an interrupted run continues at its newest checkpoint and a finished one is returned unchanged;
    without it, an existing run raises UserError.
    """
    out = Path(recipe.out)
    check_machine(recipe)  # before a recipe that cannot be trained is written into the run's folder
    recipe = _with_saved_parts(recipe, out)
    _claim(recipe, out, resume)
    if (out / WEIGHTS).is_file():
        log.info("%s: already trained", out)
        return out
    engine = Engine(recipe.train)
    job = tasks.build(recipe)
    count = sum(p.numel() for p in job.student.parameters())
    log.info("%s: %s, %.2f M parameters", out, _names(recipe), count / 1e6)
    fit(job.task, job.train, recipe, validator(job.validation, engine, job.complete), engine, job.shared, job.complete)
    if job.finish is not None:
        job.finish()
    if engine.accelerator.is_main_process:
        parts = by_teacher(_with_saved_parts(recipe, out))
        for name, part in job.parts.items():
            _save_part(parts[name], part.student)
        students.save(job.student, out)
    engine.accelerator.wait_for_everyone()
    return out


def _names(recipe: Recipe) -> str:
    return " and ".join(str(part.student["name"]) for part in by_teacher(recipe).values())


def _save_part(recipe: Recipe, student: nn.Module) -> None:
    """Save the student of one of several teachers as a finished run of its own."""
    recipes.save(recipe, recipe.out)
    students.save(student, Path(recipe.out))


def _with_saved_parts(recipe: Recipe, out: Path) -> Recipe:
    """Return the recipe with the `train.accumulate` that the run in `out` chose, if the recipe leaves it to the run."""
    if recipe.train.accumulate != "auto" or not _is_trained(out):
        return recipe
    accumulate = recipes.load_claimed(out, ["trust=true"]).train.accumulate
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, accumulate=accumulate))


def check_machine(recipe: Recipe) -> None:
    """Raise a UserError if the run is not finished and the device or the launcher's variables prevent training."""
    if not (Path(recipe.out) / WEIGHTS).is_file():
        check_training()
        pick_device(recipe.train.device, "train.device")


def _claim(recipe: Recipe, out: Path, resume: bool) -> None:
    """Save the recipe in `out`. Raises UserError if `out` holds a trained run of another recipe."""
    if _is_trained(out) and not resume:
        raise UserError(f"{out}: already holds a run; choose another out=FOLDER, or delete it")
    check_claim(recipe)
    if not (out / WEIGHTS).is_file() or os.access(out, os.W_OK):  # a finished run may be read-only
        recipes.save(recipe, out)  # with the current location of its images


def check_claim(recipe: Recipe) -> None:
    """Raise a UserError if the recipe's folder contains a run of another recipe, interrupted or finished."""
    if _is_trained(Path(recipe.out)):
        check_run(recipe, Path(recipe.out))


def _is_trained(out: Path) -> bool:
    return (out / recipes.SAVED).is_file() and ((out / WEIGHTS).is_file() or checkpoint.exists(out))


def check_run(recipe: Recipe, out: Path) -> None:
    """Raise a UserError unless the run in `out` has the same recipe, in all settings that affect the weights."""
    saved = recipes.load_claimed(out, ["trust=true"])
    old, new = (flat(dataclasses.asdict(version)) for version in (saved, recipe))
    free = FREE | recipes.free_settings()
    if finished.is_live(recipe.teacher):  # a live teacher has no cache whose manifest would state its weights
        free -= {"teacher.weights"}
    fixed = [key for key in sorted({*old, *new}) if not _is_free(key, free)]
    if recipe.train.accumulate == "auto":  # which the run has replaced
        fixed.remove("train.accumulate")
    changed = [key for key in fixed if str(old.get(key)) != str(new.get(key))]
    if changed:
        differences = "; ".join(
            f"{key} is {old.get(key)!r} in the run and {new.get(key)!r} in the recipe" for key in changed[:3]
        )
        raise UserError(f"{out}: holds a run of another recipe: {differences}. Choose another out=FOLDER, or delete it")


def _is_free(key: str, free: set[str]) -> bool:
    key = re.sub(r"^teachers\.[^.]+\.", "", key)
    parents = accumulate(key.split("."), lambda above, name: f"{above}.{name}")
    return any(parent in free for parent in parents) or bool(re.match(r"images\..*root$", key))
