"""Compare an export with the PyTorch student on real pictures, before it is published."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fmdistill import images
from fmdistill.distill.data import SplitImages
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, resolve

PHOTOGRAPHS = ("chelsea", "coffee", "flower", "coins")
READER = {"photograph": "fmdistill.mini.photos:photograph"}


def pictures(recipe: Recipe, split: str, count: int) -> list[np.ndarray]:
    """Return `count` images of a split, uint8 (H, W, 3), spread evenly; photographs of scikit-image if none is at hand.

    `split` is "train" or "validation".
    """
    try:
        built = images.build(recipe.images)
        data = SplitImages(built, split)
        places = [(shard, index) for shard, length in enumerate(data.counts) for index in range(length)]
        chosen = [places[i * len(places) // count] for i in range(min(count, len(places)))]
        decoded = [built.decode(data.encoded(shard, index), data.shards[shard].name) for shard, index in chosen]
    except (UserError, OSError) as error:
        log.info("the recipe's images are not at hand (%s); photographs of scikit-image are used", error)
        decoded = []
    return decoded or photographs()[:count]


def photographs() -> list[np.ndarray]:
    """Return photographs that ship with scikit-image and scikit-learn, uint8 (H, W, 3), of several shapes.

    The last two are cut to a square and to a portrait.
    """
    read = resolve("photograph", READER, "photograph")
    whole = [read(name) for name in PHOTOGRAPHS]
    cat, cup = whole[0], whole[1]
    return [*whole, np.ascontiguousarray(cup[:400, 100:500]), np.ascontiguousarray(cat[:, 100:300])]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference, relative to that of `expected`; infinity if a value is not finite."""
    if not np.isfinite(actual).all():
        return float("inf")
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / max(np.linalg.norm(expected.astype(np.float64)), 1e-12))


def require(figures: Mapping[str, Any], name: str, limit: float, setting: str, what: str, way_out: str = "") -> None:
    """Raise a UserError unless figures[name] is at least `limit`, the value of `setting`; `what` names the export.

    `way_out` says what else can be done, such as "choose precision=fp32, or ".
    """
    value = figures[name]
    if not value >= limit:  # also if it is not a number
        raise UserError(
            f"{what}: against the PyTorch student its {name} is {value:.4f}, below {setting}={limit:g}; nothing was "
            f"written; {way_out}accept it with {setting}={max(0.0, value):.2g}"
        )
