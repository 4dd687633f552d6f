"""The distil stage: shards -> student -> checkpoint. `run` resumes exactly where a killed run stopped."""

import dataclasses
import os
import re
from collections.abc import Mapping
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
from fmdistill.stages import by_stage, naming, saved_stages

__all__ = ["check_claim", "check_machine", "check_run", "load_student", "run"]

# Settings that may change in a resumed run, in addition to the fields that the recipe marks: the cache's manifest
# stores the hash of the weights, and the others do not change what the teacher computes.
FREE = {f"teacher.{key}" for key in ("weights", "device", "batch", "workers")}
START = "student.pretrained"


def run(recipe: Recipe, resume: bool = True) -> Path:
    """Train the recipe's student, in all its stages, and return the run's directory.

    With `resume`, an interrupted run continues at its newest checkpoint and a finished one is returned unchanged;
    without it, an existing run raises UserError.
    """
    check_machine(recipe)  # before a recipe that cannot be trained is written into the run's folder
    check_claim(recipe, resume)
    stages = by_stage(recipe)
    if recipe.stages is not None and _is_writable(Path(recipe.out)):
        recipes.save(recipe, recipe.out, recipes.STAGES)
    _check_later_stages(recipe)
    for name in _needed(stages):  # a stop ends the stage in training, where all processes agree on it
        with naming(recipe, name):
            _train(stages[name])
    return Path(recipe.out)


def _train(recipe: Recipe) -> None:
    """Train a stage of a recipe, unless its run is finished."""
    out = Path(recipe.out)
    recipe = _with_saved_parts(recipe, out)
    if _is_writable(out):
        recipes.save(recipe, out)  # with the current location of its images
    if (out / WEIGHTS).is_file():
        log.info("%s: already trained", out)
        return
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


def _needed(stages: Mapping[str, Recipe]) -> list[str]:
    """Return the stages to train or to confirm as trained: those after the last finished one, and those with a run.

    A stage before the last finished one is not trained again if its folder was deleted.
    """
    finished_stages = [name for name, stage in stages.items() if (Path(stage.out) / WEIGHTS).is_file()]
    passed = list(stages).index(finished_stages[-1]) if finished_stages else -1
    return [
        name for number, (name, stage) in enumerate(stages.items()) if number > passed or _is_trained(Path(stage.out))
    ]


def _check_later_stages(recipe: Recipe) -> None:
    """Build the jobs of the stages after an unfinished one, so that an error in them is raised before it is trained."""
    stages = by_stage(recipe)
    waiting = [name for name in _needed(stages) if not (Path(stages[name].out) / WEIGHTS).is_file()]
    for name in waiting[1:]:
        stage = stages[name]
        with naming(recipe, name):
            tasks.build(dataclasses.replace(stage, student={**stage.student, "pretrained": "none"}))


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
        for name, stage in by_stage(recipe).items():
            with naming(recipe, name):
                pick_device(stage.train.device, "train.device")


def check_claim(recipe: Recipe, resume: bool = True) -> None:
    """Raise a UserError if the folder of one of the recipe's stages contains a run of another recipe.

    Interrupted and finished runs count alike. Without `resume`, a run of the same recipe raises it too.
    """
    _check_names(recipe)
    for name, stage in by_stage(recipe).items():
        if _is_trained(Path(stage.out)):
            if not resume:
                raise UserError(f"{stage.out}: already holds a run; choose another out=FOLDER, or delete it")
            with naming(recipe, name):
                check_run(stage, Path(stage.out))


def _check_names(recipe: Recipe) -> None:
    """Raise a UserError if the recipe's folder contains runs of stages that the recipe does not have, in this order."""
    saved, names = saved_stages(recipe.out), list(recipe.stages or ())
    if saved is None or saved.stages is None or list(saved.stages) == names:
        return
    if not names and _relative_start(recipe) in saved.stages:  # the recipe of its last stage
        return
    if any(_is_trained(Path(recipe.out) / name) for name in saved.stages):
        raise UserError(
            f"{recipe.out}: holds a run of the stages {', '.join(saved.stages)}, and the recipe has "
            f"{', '.join(names) or 'no stages'}. Choose another out=FOLDER, or delete it"
        )


def _is_writable(out: Path) -> bool:
    return not (out / WEIGHTS).is_file() or os.access(out, os.W_OK)  # a finished run may be read-only


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
    start = _relative_start(recipe)
    if start is not None and start == _relative_start(saved):  # both runs may have moved together
        fixed.remove(START)
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


def _relative_start(recipe: Recipe) -> str | None:
    """Return the path of the weights that the student begins with, from the run's folder; None if it names no file."""
    start = recipe.student.get("pretrained")
    return os.path.relpath(start, recipe.out) if isinstance(start, str) and "/" in start else None
