"""Score a cached teacher before a student is trained on it, by what its family can be scored on."""

from collections.abc import Callable, Iterable
from typing import Any

from fmdistill.cache import open_cache
from fmdistill.evaluate import clip_teacher, sa1b
from fmdistill.logs import log
from fmdistill.recipe import Recipe

JUDGES: dict[str, Callable[[Recipe, Iterable[Any]], dict[str, float] | None]] = {
    "sam": lambda recipe, protocols: sa1b.judge_teacher(recipe),
    "clip": clip_teacher.judge_teacher,
}


def judge_teacher(recipe: Recipe, protocols: Iterable[Any] = ()) -> dict[str, float] | None:
    """Log how the recipe's cached teacher scores on its validation images; None where there is nothing to score by.

    `protocols` are the settings of the recipe's own, which may name what the images lack.
    """
    family = open_cache(recipe).family
    if family not in JUDGES:
        log.info("family '%s': its teacher is not scored before training", family)
        return None
    return JUDGES[family](recipe, protocols) or None
