"""The distil stage: shards -> student -> checkpoint. `run` resumes exactly where a killed run stopped."""

import dataclasses
import re
from pathlib import Path

from fmdistill import recipe as recipes
from fmdistill.backbones.device import pick_device
from fmdistill.cache import teacher
from fmdistill.cache.launcher import check_training
from fmdistill.distill import checkpoint, tasks
from fmdistill.distill.student import WEIGHTS, load_student
from fmdistill.distill.train import Engine, fit, validator
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

__all__ = ["check_machine", "check_run", "load_student", "run"]

# What may differ between a run and its resumption: nothing that moves a weight. The images may have moved, since every
# image's hash is checked; the teacher is in the cache.
FREE = {"title", "protocols", "out"}
FREE |= {f"train.{key}" for key in ("workers", "image_memory", "log_every", "validate_every", "checkpoint_every")}
FREE |= {f"teacher.{key}" for key in ("weights", "device", "batch", "workers")}


def run(recipe: Recipe, resume: bool = True) -> Path:
    """Train the recipe's student; return the run's directory. With `resume`, a finished run is left as it is."""
    out = Path(recipe.out)
    check_machine(recipe)  # before the run's folder holds a recipe that cannot be trained
    _claim(recipe, out, resume)
    if (out / WEIGHTS).is_file():
        log.info("%s: trained already", out)
        return out
    engine = Engine(recipe.train)
    job = tasks.build(recipe)
    count = sum(p.numel() for p in job.student.parameters())
    log.info("%s: %s, %.2f M parameters", out, recipe.student["name"], count / 1e6)
    fit(job.task, job.train, recipe, validator(job.validation, engine, job.complete), engine, job.shared, job.complete)
    if engine.accelerator.is_main_process:
        checkpoint.save_state(job.student.state_dict(), out / WEIGHTS)
    engine.accelerator.wait_for_everyone()
    return out


def check_machine(recipe: Recipe) -> None:
    """Raise a UserError if the run is to be trained and the device or the launcher's variables do not allow it."""
    if not (Path(recipe.out) / WEIGHTS).is_file():
        check_training()
        pick_device(recipe.train.device, "train.device")


def _claim(recipe: Recipe, out: Path, resume: bool) -> None:
    if not (out / recipes.SAVED).is_file():
        recipes.save(recipe, out)
        return
    if not resume:
        raise UserError(f"{out}: holds a run already; choose another out=FOLDER, or delete it")
    check_run(recipe, out)
    recipes.save(recipe, out)  # where its images lie now


def check_run(recipe: Recipe, out: Path) -> None:
    """Raise a UserError unless the run in `out` is of this recipe, in all that moves a weight."""
    old, new = _flat(recipes.load_saved(out, ["trust=true"])), _flat(recipe)
    free = FREE - {"teacher.weights"} if teacher.is_live(recipe.teacher) else FREE  # no cache stands for it
    held = [k for k in sorted({*old, *new}) if k not in free and not re.match(r"images\..*root$", k)]
    changed = [k for k in held if str(old.get(k)) != str(new.get(k))]
    if changed:
        shown = "; ".join(f"{k} is {old.get(k)!r} there and {new.get(k)!r} here" for k in changed[:3])
        raise UserError(f"{out}: holds a run of another recipe: {shown}. Choose another out=FOLDER, or delete it")


def _flat(recipe: Recipe) -> dict[str, object]:
    def walk(value: object, where: str) -> dict[str, object]:
        if isinstance(value, dict):
            return {
                k: v for key, inner in value.items() for k, v in walk(inner, f"{where}.{key}" if where else key).items()
            }
        return {where: value}

    return walk(dataclasses.asdict(recipe), "")
