"""Read a detector's boxes, which prompt a segmenter, from JSON in COCO's results layout: ViTDet's, for example."""

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fmdistill.registry import UserError

Id = int | str
LAYOUT = "a list of {image_id, category_id, bbox: [x, y, width, height], score}"


@dataclass(frozen=True)
class Boxes:
    """The boxes of one image, in the order of the file; D boxes."""

    categories: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    xyxy_D4: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))  # float64, in original pixels


@dataclass(frozen=True)
class Detections:
    """Boxes by image, and how many entries of the file were left out for which reason."""

    by_image: Mapping[Id, Boxes]
    skipped: Mapping[str, int]


def read(path: str | Path, images: Collection[Id], categories: Collection[int] | None) -> Detections:
    """Read the boxes of `images`, the ids of the annotated images, and of their `categories`; None allows any.

    Entries that are malformed, not finite or of other images are left out and counted. Raises UserError if the file
    is no such list, or is one of another data set: none of its images is known, or a category is not.
    """
    path = Path(path).expanduser()
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"boxes={path}: not a readable JSON ({str(error)[:80]}); expected {LAYOUT}") from error
    if not isinstance(entries, list) or not entries:
        kind = "an empty list" if entries == [] else type(entries).__name__
        raise UserError(f"boxes={path}: holds {kind}; expected {LAYOUT}")
    return checked(entries, set(images), None if categories is None else set(categories), f"boxes={path}")


def checked(entries: list[Any], images: Collection[Id], categories: Collection[int] | None, place: str) -> Detections:
    """Return the boxes of a list in the layout, as `read` does; `place` names the list in errors."""
    skipped: Counter[str] = Counter()
    parts: dict[Id, list[tuple[int, float, list[float]]]] = {}
    strange: Counter[Any] = Counter()
    for entry in entries:
        if problem := _problem(entry):
            skipped[problem] += 1
        elif entry["image_id"] not in images:
            skipped["of an image that is missing or not annotated"] += 1
        elif categories is not None and entry["category_id"] not in categories:
            strange[entry["category_id"]] += 1
        else:
            x, y, width, height = entry["bbox"]
            box = [float(v) for v in (x, y, x + width, y + height)]
            parts.setdefault(entry["image_id"], []).append((entry["category_id"], float(entry["score"]), box))
    if strange:
        shown = ", ".join(map(str, sorted(strange)[:5]))
        raise UserError(
            f"{place}: {sum(strange.values())} boxes of categories that the annotations do not have ({shown}): a "
            f"detector of another data set, or one that numbers the classes without COCO's gaps"
        )
    if not parts:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in skipped.most_common())
        raise UserError(f"{place}: no box of an annotated image ({reasons}); expected {LAYOUT}, of the same data set")
    return Detections({image: _boxes(members) for image, members in parts.items()}, dict(skipped))


def _boxes(members: list[tuple[int, float, list[float]]]) -> Boxes:
    categories, scores, xyxy = zip(*members, strict=True)
    return Boxes(list(categories), list(scores), np.array(xyxy, dtype=np.float64))


def _problem(entry: Any) -> str | None:
    """Return why an entry of the list cannot be used, or None."""
    if not isinstance(entry, dict):
        return "not a mapping"
    if missing := [name for name in ("image_id", "category_id", "bbox", "score") if name not in entry]:
        return f"no {missing[0]}"
    if not isinstance(entry["image_id"], int | str) or type(entry["category_id"]) is not int:
        return "an id that is not a number"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        return "a bbox that is not four numbers"
    if not all(math.isfinite(value) for value in box):
        return "a bbox that is not finite"
    if box[2] < 0 or box[3] < 0:
        return "a bbox of negative size"
    if not _is_number(entry["score"]):
        return "a score that is not a number"
    return None if math.isfinite(entry["score"]) else "a score that is not finite"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
