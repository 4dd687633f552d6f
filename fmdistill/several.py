"""Recipes of several teachers: the part of each teacher as a recipe of its own."""

import dataclasses
import re
from dataclasses import dataclass

from fmdistill.recipe import CacheSettings, Component, Recipe
from fmdistill.registry import UserError, typed

NAME = re.compile(r"[a-z][a-z0-9_]*")
TAKEN = ("checkpoints", "evaluation", "tensorboard")  # folders that a run has already
OF_EACH = ("student", "teacher", "cache", "objective")  # settings that each teacher has instead of the recipe


@dataclass(frozen=True)
class TeacherPart:
    """What a recipe of several teachers says of one of them."""

    teacher: Component  # the frozen model
    cache: CacheSettings  # where and how its outputs are stored
    student: Component  # the shared trunk with the head for this teacher
    objective: dict[str, dict]  # the terms of the loss that compare the two


def by_teacher(recipe: Recipe) -> dict[str, Recipe]:
    """Return the part of each teacher by its name, a recipe whose run is the folder of that name in `recipe.out`.

    A recipe of one teacher, or of none, is its only part, under the name "". Raises UserError for a wrong setting.
    """
    if not recipe.teachers:
        return {"": recipe}
    for setting in OF_EACH:
        if getattr(recipe, setting):
            raise UserError(
                f"{setting}: ignored, since this recipe has `teachers`, each with its own {setting}; move it to "
                f"teachers.{next(iter(recipe.teachers))}.{setting} (on the command line, {setting}=null removes it)"
            )
    if len(recipe.teachers) < 2:
        raise UserError(f"teachers: {len(recipe.teachers)} teacher; name two or more, or use `teacher` and `cache`")
    return {name: _part(recipe, name, settings) for name, settings in recipe.teachers.items()}


def _part(recipe: Recipe, name: str, settings: Component) -> Recipe:
    if not NAME.fullmatch(name) or name in TAKEN:
        raise UserError(
            f"teachers.{name}: names a folder in the run; use lower-case letters, digits and _, but not "
            f"{' or '.join(TAKEN)}"
        )
    part = TeacherPart(**typed(TeacherPart, settings, f"teachers.{name}"))
    own = {key: getattr(part, key) for key in OF_EACH}
    title = f"{recipe.title}, {name}" if recipe.title else name
    return dataclasses.replace(recipe, out=f"{recipe.out}/{name}", title=title, teachers={}, **own)
