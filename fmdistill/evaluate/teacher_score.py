"""Score a cached teacher before a student is trained on it, by its family's own measure."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from fmdistill import teachers
from fmdistill.cache import open_cache
from fmdistill.evaluate import stored_results
from fmdistill.evaluate.results import Row
from fmdistill.files import write_whole
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, resolve

JUDGES: dict[str, Any] = {  # by family: (recipe, its evaluators) -> rows, none if the images offer nothing to compare
    "sam": "fmdistill.evaluate.sa1b:judge_teacher",
    "clip": "fmdistill.evaluate.clip_teacher:judge_teacher",
}

NAME = "teacher_score.json"  # in a cache


def check_weights(recipe: Recipe) -> None:
    """Raise a UserError for a protocol with `teacher=true` if the recipe has no teacher, or its weights are missing."""
    if recipe.teacher is None:
        raise UserError("teacher=true: this recipe has no teacher; remove the setting")
    weights = teachers.weights_file(recipe.teacher)
    if weights is not None and not weights.exists():
        raise UserError(f"teacher=true: its weights {weights} do not exist; remove the setting")


def judge_teacher(recipe: Recipe, evaluators: Sequence[Any] = ()) -> list[Row]:
    """Log and return the score of the recipe's cached teacher on its validation images; no rows if it has none.

    `evaluators` are those of the recipe's protocols, which may supply what the images lack, such as class names. The
    score is stored beside the cache's manifest and reused while cache, images and protocols are the same.
    """
    cache = open_cache(recipe)
    if cache.family not in JUDGES:
        log.info("family '%s': its teacher is not scored before training", cache.family)
        return []
    path = cache.root / NAME
    protocols = [[type(evaluator).__name__, dataclasses.asdict(evaluator)] for evaluator in evaluators]
    state = {**stored_results.state({}, recipe, {}), "protocol": json.loads(json.dumps(protocols))}
    if (rows := stored_results.read_rows(path, state)) is not None:
        log.info("%s: the teacher was scored already", path)
        return rows
    rows = resolve(cache.family, JUDGES, "teacher.family")(recipe, evaluators)
    if os.access(cache.root, os.W_OK):  # a cache may be read-only
        write_whole(path, json.dumps({"rows": rows, "of": state}, indent=1))
    return rows
