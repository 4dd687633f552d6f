"""Score a cached teacher before a student is trained on it, by what its family can be scored on."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fmdistill.cache import open_cache
from fmdistill.evaluate import clip_teacher, kept, sa1b
from fmdistill.files import write_whole
from fmdistill.logs import log
from fmdistill.recipe import Recipe

JUDGES: dict[str, Callable[[Recipe, Iterable[Any]], dict[str, float] | None]] = {
    "sam": lambda recipe, protocols: sa1b.judge_teacher(recipe),
    "clip": clip_teacher.judge_teacher,
}

NAME = "teacher_score.json"  # in a cache


def judge_teacher(recipe: Recipe, protocols: Sequence[Any] = ()) -> dict[str, float] | None:
    """Log how the recipe's cached teacher scores on its validation images; None if there is nothing to score by.

    `protocols` are the settings of the recipe's own, which may name what the images lack. The score is stored beside
    the cache's manifest, and not made again while cache, images and protocols are the same.
    """
    cache = open_cache(recipe)
    if cache.family not in JUDGES:
        log.info("family '%s': its teacher is not scored before training", cache.family)
        return None
    path = cache.root / NAME
    described = [[type(one).__name__, dataclasses.asdict(one)] for one in protocols]
    state = {**kept.state({}, recipe, {}), "protocol": json.loads(json.dumps(described))}
    if (stored := kept.stored(path, state)) is not None:
        log.info("%s: the teacher was scored already", path)
        return stored or None
    found = JUDGES[cache.family](recipe, protocols) or {}
    if os.access(cache.root, os.W_OK):  # a cache may be lent for reading only
        write_whole(path, json.dumps({"metrics": found, "of": state}, indent=1))
    return found or None
