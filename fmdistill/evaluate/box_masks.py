"""Segment the boxes of one image by every subject, into JSON that average precision is computed from.

Letters: P boxes of a batch, M masks of a box (1 or 3), D boxes of the image, n the low resolution's side,
H x W original pixels.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from fmdistill import stop
from fmdistill.evaluate.detections import Boxes
from fmdistill.evaluate.mask_choice import binary, choose
from fmdistill.evaluate.masks import to_rle
from fmdistill.evaluate.matching import ALL, Rules, counted
from fmdistill.evaluate.segmenters import ImageSegmenter, SegmentedImage
from fmdistill.evaluate.truth.instances import MALFORMED, ImageTruth, Instance, Skip, problem

Select = Literal["single", "best_predicted"]
OTHER_SIZE = "image of another size"  # the reason of truths that leave a whole image out


def segment(
    image: SegmentedImage, truth: ImageTruth, boxes: Boxes | None, rules: Rules, select: Select, batch: int
) -> dict[str, Any]:
    """Return an image's objects and detections as JSON, with a mask of every box by each subject.

    Without `boxes` the objects that are no crowds are the boxes, with score 1. Boxes that cannot count by `rules` are
    left out. Keys: size [H, W], objects and detections in COCO's layout without masks, truth (the objects' RLE counts),
    masks (the detections' RLE counts by subject), predicted (their predicted IoU by subject), unfinished, skipped; only
    skipped if the image has another size than its annotations.
    """
    skipped = list(truth.skipped)
    if any(skip.reason == OTHER_SIZE for skip in skipped):
        return {"skipped": [list(skip) for skip in skipped]}
    objects, counts = [], []
    for one in truth.instances:
        try:
            counts.append(to_rle(one.mask(image.original))["counts"])
            objects.append(one)
        except MALFORMED as error:
            skipped.append(Skip("mask malformed", f"{image.name}, annotation {one.id}: {problem(error)}"))
    categories = {_category(one) for one in objects}
    boxes = _of_objects(objects) if boxes is None else boxes
    chosen = counted(boxes.categories, boxes.scores, categories, truth.negative, rules)
    answers = {
        name: list(_answers(segmenter, boxes.xyxy_D4[chosen], select, batch))
        for name, segmenter in image.segmenters.items()
    }
    return {
        "size": list(image.original),
        "objects": [{"category_id": _category(one), "area": one.area, "iscrowd": int(one.crowd)} for one in objects],
        "truth": counts,
        "detections": [{"category_id": boxes.categories[i], "score": boxes.scores[i]} for i in chosen],
        "masks": {name: [text for text, _ in pairs] for name, pairs in answers.items()},
        "predicted": {name: [predicted for _, predicted in pairs] for name, pairs in answers.items()},
        "unfinished": sorted(truth.not_exhaustive),
        "skipped": [list(skip) for skip in skipped],
    }


def with_masks(annotations: Sequence[dict[str, Any]], counts: Sequence[str], size: Sequence[int]) -> list[dict]:
    """Return COCO annotations with their masks."""
    return [
        {**one, "segmentation": {"size": list(size), "counts": text}}
        for one, text in zip(annotations, counts, strict=True)
    ]


def _category(one: Instance) -> int:
    return ALL if one.category is None else one.category


def _of_objects(objects: Sequence[Instance]) -> Boxes:
    prompted = [one for one in objects if not one.crowd]
    xyxy = [(x, y, x + width, y + height) for x, y, width, height in (one.box for one in prompted)]
    return Boxes([_category(one) for one in prompted], [1.0] * len(prompted), np.array(xyxy).reshape(-1, 4))


@torch.inference_mode()
def _answers(segmenter: ImageSegmenter, xyxy_D4: np.ndarray, select: Select, batch: int) -> Iterator[tuple[str, float]]:
    """Yield the RLE counts and the predicted IoU of each box's mask."""
    starts = range(0, len(xyxy_D4), batch)
    for start in stop.between(starts):
        boxes_P4 = xyxy_D4[start : start + batch]
        logits_PMnn, predicted_PM = segmenter.decode(boxes=boxes_P4, multimask=select == "best_predicted")
        logits_Pnn = choose(logits_PMnn, predicted_PM, select)[:, 0]
        pieces = binary(segmenter.head, logits_Pnn, segmenter.original, segmenter.resized, "original")
        counts = [to_rle(mask_HW)["counts"] for piece in pieces for mask_HW in piece.cpu().numpy()]
        yield from zip(counts, predicted_PM.amax(1).tolist(), strict=True)
