"""Recipes of several stages: the recipe of each, whose student begins as that of the stage before."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fmdistill.recipe import STAGES, Recipe, freeze, load
from fmdistill.registry import UserError, suggest
from fmdistill.settings import merge
from fmdistill.several import NAME, TAKEN

OF_EACH = ("task", "objective", "optimizer", "schedule", "train", "student")  # settings that a stage may change
OF_STUDENT = ("freeze", "pretrained")  # of these, `pretrained` only in the first stage
SHARED = ("images", "teacher", "cache", "protocols")  # settings of which all stages read the recipe's own


def by_stage(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipe of each stage by its name, in their order: the recipe itself with what the stage changes.

    The run of the last stage is in `recipe.out`, that of each other in the folder of its name there, and each but the
    first begins with the student of the run before. A recipe without stages is its only stage, under the name "".
    Raises UserError for a wrong setting.
    """
    if recipe.stages is None:
        return {"": recipe}
    _check(recipe, recipe.stages)
    whole, last = {**dataclasses.asdict(recipe), "stages": None}, list(recipe.stages)[-1]
    parts: dict[str, Recipe] = {}
    start: dict[str, Any] = {}  # the student's settings that name the run before
    for name, changes in recipe.stages.items():
        own = {"title": recipe.title, "out": recipe.out}
        if name != last:
            own = {"title": ", ".join(filter(None, [recipe.title, name])), "out": f"{recipe.out}/{name}"}
        with naming(recipe, name):
            parts[name] = freeze(merge(merge(whole, changes), {**own, **start}))
        start = {"student": {"pretrained": own["out"]}}
    return parts


def last_stage(recipe: Recipe) -> Recipe:
    """Return the recipe of the last stage, whose run is the recipe's; the recipe itself if it has no stages."""
    return list(by_stage(recipe).values())[-1]


def saved_stages(run: str | Path) -> Recipe | None:
    """Return the recipe that is saved in the run of several stages, None if `run` contains none."""
    path = Path(run) / STAGES
    return load(path, ["trust=true"]) if path.is_file() else None  # reading a recipe imports nothing


@contextlib.contextmanager
def naming(recipe: Recipe, stage: str) -> Iterator[None]:
    """Put the stage's name before the message of a UserError raised in the block: "stages.NAME.train.steps=0: ...".

    A message about what all stages share, or of a stage that changes nothing, stays as it is.
    """
    try:
        yield
    except UserError as error:
        changes, first = (recipe.stages or {}).get(stage), re.match(r"\w*", str(error))
        setting = first[0] if first else ""
        if not changes or setting in (*SHARED, "stages"):
            raise
        joint = "." if setting in changes else ": "
        raise UserError(f"stages.{stage}{joint}{error}") from None


def _check(recipe: Recipe, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise a UserError if the stages cannot be those of the recipe, by their names and what they change."""
    if recipe.teachers:
        raise UserError(
            "stages: a recipe of several `teachers` is trained in one; remove one of the two (on the command line, "
            "stages=null)"
        )
    if len(stages) < 2:
        raise UserError(
            f"stages: {len(stages)} named; name two or more, or leave `stages` out (on the command line, stages=null)"
        )
    for number, (name, changes) in enumerate(stages.items()):
        if not NAME.fullmatch(name) or name in TAKEN:
            raise UserError(
                f"stages.{name}: names a folder in the run; use lower-case letters, digits and _, but not "
                f"{' or '.join(TAKEN)}"
            )
        for setting in changes:
            _check_setting(setting, f"stages.{name}.{setting}")
        student = changes.get("student")
        if isinstance(student, Mapping):
            _check_student(student, f"stages.{name}.student", list(stages)[number - 1] if number else "")


def _check_setting(setting: str, where: str) -> None:
    if setting in OF_EACH:
        return
    if setting in {field.name for field in dataclasses.fields(Recipe)}:
        raise UserError(
            f"{where}: all stages have the recipe's `{setting}`; set it there. A stage changes {', '.join(OF_EACH)}"
        )
    raise UserError(f"{where}: no such setting, it would be ignored.{suggest(setting, OF_EACH)}")


def _check_student(student: Mapping[str, Any], where: str, before: str) -> None:
    for setting, value in student.items():
        if setting == "pretrained" and before:
            raise UserError(
                f"{where}.pretrained={value}: this stage begins with the student of the stage {before}; remove it, or "
                f"set student.pretrained, with which the first stage begins"
            )
        if setting not in OF_STUDENT:
            raise UserError(
                f"{where}.{setting}={value}: all stages train the recipe's student; set it as student.{setting}. A "
                f"stage changes student.freeze"
            )
