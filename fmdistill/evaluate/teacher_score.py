"""Score a cached teacher before a student is trained on it, by what its family can be scored on."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from fmdistill.cache import open_cache
from fmdistill.evaluate import kept
from fmdistill.evaluate.results import Row
from fmdistill.files import write_whole
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import resolve

JUDGES: dict[str, Any] = {  # by family: (recipe, its evaluators) -> rows, none if there is nothing to score by
    "sam": "fmdistill.evaluate.sa1b:judge_teacher",
    "clip": "fmdistill.evaluate.clip_teacher:judge_teacher",
}

NAME = "teacher_score.json"  # in a cache


def judge_teacher(recipe: Recipe, evaluators: Sequence[Any] = ()) -> list[Row]:
    """Log how the recipe's cached teacher scores on its validation images; return no rows if nothing tells.

    `evaluators` are those of the recipe's own protocols, which may name what the images lack. The score is stored
    beside the cache's manifest, and not made again while cache, images and protocols are the same.
    """
    cache = open_cache(recipe)
    if cache.family not in JUDGES:
        log.info("family '%s': its teacher is not scored before training", cache.family)
        return []
    path = cache.root / NAME
    described = [[type(evaluator).__name__, dataclasses.asdict(evaluator)] for evaluator in evaluators]
    state = {**kept.state({}, recipe, {}), "protocol": json.loads(json.dumps(described))}
    if (stored := kept.stored(path, state)) is not None:
        log.info("%s: the teacher was scored already", path)
        return stored
    rows = resolve(cache.family, JUDGES, "teacher.family")(recipe, evaluators)
    if os.access(cache.root, os.W_OK):  # a cache may be lent for reading only
        write_whole(path, json.dumps({"rows": rows, "of": state}, indent=1))
    return rows
