"""Match the detections of one image to its annotated objects by the rules of COCO or LVIS.

pycocotools computes the overlaps and the matches; what LVIS changes comes before and after it.
Letters: D detections, G objects, A area ranges, T IoU thresholds, H x W pixels.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval, Params

from fmdistill.evaluate.boundary import boundary
from fmdistill.evaluate.masks import to_rle

Rle = Mapping[str, Any]  # COCO's compressed RLE: {"size": [H, W], "counts": str}
Annotation = Mapping[
    str, Any
]  # COCO's: category_id, segmentation (an Rle); of objects area, iscrowd; of detections score

AREAS: dict[str, list[float]] = dict(zip(Params("segm").areaRngLbl, Params("segm").areaRng, strict=True))
IOUS_T: np.ndarray = Params("segm").iouThrs
ALL = 1  # the category of every object if classes do not count
IMAGE = 0


@dataclass(frozen=True)
class Rules:
    """What counts as a match: the settings of COCOeval, and what LVIS's rules change.

    `limits` are the numbers of best detections that recall is stated for, in ascending order; the last one limits
    precision. COCO limits each category of an image, LVIS (`federated`) the image. With `federated`, a category counts
    on an image only if it is annotated or known to be absent there, and unmatched detections of a category that is
    not annotated exhaustively are ignored; there are no crowds. Without `classes`, objects and detections of all
    categories match each other. With `boundary`, a share of the image's diagonal, the overlap of a detection and an
    object that is no crowd is the smaller of mask IoU and boundary IoU.
    Sources: pycocotools/cocoeval.py; lvis-api lvis/eval.py and lvis/results.py; boundary-iou-api.
    """

    limits: tuple[int, ...] = (1, 10, 100)
    federated: bool = False
    classes: bool = True
    boundary: float | None = None


@dataclass(frozen=True)
class Matches:
    """The detections of one category on one image, by falling score, and the number of objects that count."""

    scores_D: np.ndarray  # float64
    matched_ATD: np.ndarray  # bool: matched to an object
    ignored_ATD: np.ndarray  # bool: neither right nor wrong
    objects_A: np.ndarray  # int


def counted(
    categories: Sequence[int],
    scores: Sequence[float],
    annotated: Collection[int],
    absent: Collection[int],
    rules: Rules,
) -> list[int]:
    """Return the indices of an image's detections that can count, in their order; all of them unless `federated`.

    `annotated` are the categories of the image's objects, `absent` those known not to be on it (LVIS's
    neg_category_ids). The masks of all other detections need not be computed.
    """
    indices = list(range(len(categories)))
    if not rules.federated:
        return indices
    if len(indices) > rules.limits[-1]:
        indices = sorted(indices, key=lambda i: -scores[i])[: rules.limits[-1]]
    if not rules.classes:
        return indices
    return [i for i in indices if categories[i] in annotated or categories[i] in absent]


def match(
    objects: Iterable[Annotation], detections: Iterable[Annotation], rules: Rules, unfinished: Collection[int] = ()
) -> dict[int, Matches]:
    """Match the detections that `counted` returns to the objects of the same image; return the matches by category.

    `unfinished` are the categories that are not annotated exhaustively on the image (LVIS's
    not_exhaustive_category_ids).
    """
    objects, detections = list(objects), list(detections)
    if not rules.classes:  # by category first: the order of COCOeval without categories
        objects, detections = (sorted(part, key=lambda a: a["category_id"]) for part in (objects, detections))
    evaluation: Any = COCOeval(iouType="segm")
    evaluation.params.maxDets = list(rules.limits)
    for number, one in enumerate(objects, start=1):
        crowd = 0 if rules.federated else int(one.get("iscrowd", 0))
        fields = {"id": number, "area": one["area"], "iscrowd": crowd, "ignore": crowd}
        evaluation._gts[IMAGE, _category(one, rules)].append({"segmentation": one["segmentation"], **fields})
    for number, one in enumerate(detections, start=1):
        fields = {"id": number, "area": coco_mask.area(one["segmentation"]), "score": one["score"]}
        evaluation._dts[IMAGE, _category(one, rules)].append({"segmentation": one["segmentation"], **fields})
    categories = sorted({category for _, category in [*evaluation._gts, *evaluation._dts]})
    return {category: _match(evaluation, category, rules, category in unfinished) for category in categories}


def _category(annotation: Annotation, rules: Rules) -> int:
    return annotation["category_id"] if rules.classes else ALL


def _match(evaluation: Any, category: int, rules: Rules, unfinished: bool) -> Matches:
    evaluation.ious[IMAGE, category] = _overlaps(evaluation, category, rules)
    entries: list[Any] = [
        evaluation.evaluateImg(IMAGE, category, area, evaluation.params.maxDets[-1]) for area in AREAS.values()
    ]
    matched_ATD = np.stack([entry["dtMatches"] for entry in entries]) > 0
    ignored_ATD = np.stack([entry["dtIgnore"] for entry in entries]).astype(bool)
    if unfinished and rules.federated and rules.classes:
        ignored_ATD |= ~matched_ATD
    objects_A = np.array([np.count_nonzero(entry["gtIgnore"] == 0) for entry in entries])
    return Matches(np.asarray(entries[0]["dtScores"], dtype=np.float64), matched_ATD, ignored_ATD, objects_A)


def _overlaps(evaluation: Any, category: int, rules: Rules) -> Any:
    """Return the overlaps (D, G) of COCOeval, or [] as it does if either is missing."""
    overlaps = evaluation.computeIoU(IMAGE, category)
    if rules.boundary is None or len(overlaps) == 0:
        return overlaps
    banded: Any = COCOeval(iouType="segm")
    banded.params.maxDets = evaluation.params.maxDets
    for of, to in ((evaluation._gts, banded._gts), (evaluation._dts, banded._dts)):
        for one in of[IMAGE, category]:
            to[IMAGE, category].append({**one, "segmentation": _band(one["segmentation"], rules.boundary)})
    crowd_G = np.array([one["iscrowd"] for one in evaluation._gts[IMAGE, category]], dtype=bool)
    return np.where(crowd_G, overlaps, np.minimum(overlaps, banded.computeIoU(IMAGE, category)))


def _band(rle: Any, ratio: float) -> Rle:
    return to_rle(boundary(coco_mask.decode(rle).astype(bool), ratio))
