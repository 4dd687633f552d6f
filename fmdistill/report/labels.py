"""Collect validation images with the labels that teacher and students gave them in a stored zero-shot evaluation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdistill.cache import open_cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate.results import STUDENT, TEACHER
from fmdistill.evaluate.text_classifier import class_names
from fmdistill.report.rows import Run


@dataclass(frozen=True)
class Labelled:
    """An image (h, w, 3) uint8, and each network's best label by name, the teacher's first.

    `agrees` is whether the first run gives the teacher's label, and `share` that of the judged images with the same
    answer to this.
    """

    key: str
    image: np.ndarray
    answers: dict[str, str]
    agrees: bool
    share: float


def gather(runs: list[Run], shown: int = 5) -> list[Labelled]:
    """Return up to `shown` images on which the first run agrees with the teacher, then as many on which it does not.

    Runs of another cache than the first run's are left out. Raises UserError if the images or the cache are missing.
    """
    answers = {run.name: by_key for run in runs if (by_key := _predictions(run, STUDENT))}
    teacher = _predictions(runs[0], TEACHER)
    if runs[0].name not in answers or not teacher:
        return []
    data = CachedImages(open_cache(runs[0].recipe), "validation")
    places = {key: (i, j) for i, shard in enumerate(data.shards) for j, key in enumerate(shard.keys)}
    first = answers[runs[0].name]
    keys = [key for key in teacher if key in first and key in places]
    agreed = [key for key in keys if first[key] == teacher[key]]
    differing = [key for key in keys if first[key] != teacher[key]]
    names = [run.name for run in runs if run.name in answers and run.recipe.cache == runs[0].recipe.cache]
    return [
        Labelled(
            key,
            data.batch([places[key]])["pixels"][0].permute(1, 2, 0).numpy(),
            {TEACHER: teacher[key], **{name: answers[name][key] for name in names if key in answers[name]}},
            agrees,
            len(members) / len(keys),
        )
        for agrees, members in ((True, agreed), (False, differing))
        for key in _spread(members, shown)
    ]


def _predictions(run: Run, subject: str) -> dict[str, str]:
    """Return the best label of each image's key, from the run's first result with predictions; {} without one."""
    for stem, result in run.evaluations.items():
        if "classnames" in result.protocol:
            stored: Mapping[str, Any] = json.loads((run.folder / "evaluation" / f"{stem}.json").read_text())
            names = class_names(result.protocol["classnames"])
            return {
                image["key"]: names[image["prediction"]]
                for image in stored.get("images", [])
                if image["subject"] == subject
            }
    return {}


def _spread(keys: list[str], count: int) -> list[str]:
    return [keys[round(i)] for i in sorted({round(i) for i in np.linspace(0, len(keys) - 1, count)})] if keys else []
