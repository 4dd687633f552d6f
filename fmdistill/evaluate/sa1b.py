"""Score a cached teacher against SA-1B's own masks, before a student is trained on it.

Letters: P annotated points of one image, H x W original pixels.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmdistill import stop
from fmdistill.backbones.device import pick_device
from fmdistill.backbones.fast_decoder import image_decoder
from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache import open_cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate import results
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.masks import innermost, iou, pack
from fmdistill.evaluate.results import TEACHER, Judged, Row
from fmdistill.evaluate.segmentation import Size, decode_segmentation
from fmdistill.evaluate.truth.instances import MALFORMED, problem
from fmdistill.evaluate.truth.sa1b import COLUMN
from fmdistill.logs import log, progress
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

MASKS = ("picked", "best")
LOW_MIOU = 0.3  # picked mIoU below which a warning names likely causes


@dataclass(frozen=True)
class Sa1b:
    """Settings of the score: each annotation's first point is a prompt, and masks are logits > 0 at full resolution.

    An annotation without `point_coords`, which only SA-1B's have, is prompted at the pixel of its mask furthest from
    the mask's edge. Masks may be in any of COCO's forms: RLE, compressed or with listed counts, and polygons. `best`
    is the best of masks 1 to 3, `picked` the one with the highest predicted IoU. The first `annotations` of each of
    the first `images` validation images count.
    """

    images: int = 32
    annotations: int = 32
    device: str = "auto"

    def __post_init__(self) -> None:
        """Raise a UserError for a number below 1."""
        for name, value in (("images", self.images), ("annotations", self.annotations)):
            if value < 1:
                raise UserError(f"{name}={value}: needs at least 1")


@dataclass(frozen=True)
class Sa1bCase:
    """One image: its float32 embedding (C, g, g), its annotations as stored, original (H, W) and resized (h, w)."""

    key: str
    embedding: Tensor
    text: bytes
    original: Size
    resized: Size


def judge_teacher(recipe: Recipe, evaluators: Iterable[object] = (), protocol: Sa1b = Sa1b()) -> list[Row]:
    """Log and return the score of the recipe's cached teacher on its validation images' masks; no rows without masks.

    `evaluators` is unused: no protocol of a recipe supplies masks.
    """
    cache = open_cache(recipe)
    data = CachedImages(cache, "validation")
    shards = annotated_shards(data)
    if not shards:
        return []
    total = min(protocol.images, sum(data.counts[number] for number in shards))
    tracked = progress(cases(data, shards), "SA-1B's own masks", total=total, unit="image")
    rows, details = run(protocol, cache.head(), tracked)
    for skipped in details["skipped"][:3]:
        log.warning("%s: SA-1B's masks: skipped %s", cache.root, skipped)
    if len(details["skipped"]) > 3:
        log.warning("%s: SA-1B's masks: skipped %d more", cache.root, len(details["skipped"]) - 3)
    if not details["annotations"]:
        log.warning("%s: SA-1B's masks: none could be read, so the teacher is not scored against them", cache.root)
        return rows
    picked, best = (results.value(rows, "miou", TEACHER, mask=mask) for mask in MASKS)
    log.info(
        "%s: the teacher scores %.2f (picked), %.2f (best of three) mIoU against SA-1B's own masks: "
        "%d annotations on %d images",
        cache.root,
        picked,
        best,
        *(results.value(rows, metric, TEACHER) for metric in ("annotations", "images")),
    )
    if picked < LOW_MIOU:
        log.warning(
            "%s: that is below %.1f. Likely causes: teacher.weights is another model's file or untrained; images.root "
            "holds other images than the JSON describes; the masks are not SAM's",
            cache.root,
            LOW_MIOU,
        )
    return rows


def annotated_shards(data: CachedImages) -> list[int]:
    """Return the indices of the shards with SA-1B's annotations: those of every group whose first image has them."""
    is_annotated: dict[str, bool] = {}
    for number, shard in enumerate(data.shards):
        if shard.samples and shard.group not in is_annotated:
            is_annotated[shard.group] = _has_annotations(data.encoded(number, 0).extra)
    return [number for number, shard in enumerate(data.shards) if is_annotated.get(shard.group)]


def cases(data: CachedImages, shards: Iterable[int]) -> Iterator[Sa1bCase]:
    """Yield the images of the shards in order; the text of an image without annotations is empty."""
    for number in shards:
        for index, sample in enumerate(data.shards[number].samples):
            text = data.encoded(number, index).extra.get(COLUMN, b"")
            embedding = data.outputs([(number, index)])["embedding"][0]
            sizes = [(int(h), int(w)) for h, w in (sample["original"], sample["resized"])]
            yield Sa1bCase(sample["key"], embedding, text, sizes[0], sizes[1])


def run(protocol: Sa1b, head: PromptHead, cases: Iterable[Sa1bCase]) -> Judged:
    """Score the cases; return rows of `miou` for the masks "picked" and "best", and of counts, with details.

    The counts are of annotations, images, and skipped images or annotations. Details are {"annotations": the scores of
    each, "skipped": a line with the place and the problem of each that could not be read}, and `Means.details`.
    """
    device = pick_device(protocol.device, "device")
    head = head.to(device).eval()
    scored: list[dict] = []
    skipped: list[str] = []
    for case in stop.between(islice(cases, protocol.images)):
        points, truth = [], []
        for place, annotation in _annotations(case, protocol.annotations, skipped):
            try:
                mask_HW = decode_segmentation(annotation["segmentation"], case.original)
                point = _point(annotation, mask_HW)
            except MALFORMED as error:
                skipped.append(f"{place}: {problem(error)}")
                continue
            points.append(point)
            truth.append(mask_HW)
        if points:
            scored += _scores(head, case, np.array(points), truth)
    means = Means()
    for score in scored:
        for mask in MASKS:
            means.add(score["key"], TEACHER, "miou", [score[mask]], mask=mask)
    rows = means.rows()
    counts = {"annotations": len(scored), "images": len({score["key"] for score in scored}), "skipped": len(skipped)}
    rows += [results.row(TEACHER, metric, count) for metric, count in counts.items()]
    return rows, {"annotations": scored, "skipped": skipped, **means.details()}


def _has_annotations(extra: Mapping[str, bytes]) -> bool:
    """Return whether the JSON is SA-1B's, or damaged, and not the metadata that img2dataset stores with that suffix."""
    if COLUMN not in extra:
        return False
    try:
        return "annotations" in json.loads(extra[COLUMN])
    except MALFORMED:
        return True


def _annotations(case: Sa1bCase, limit: int, skipped: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        annotations = json.loads(case.text)["annotations"]
        if not isinstance(annotations, list):
            raise ValueError(f"its annotations are {type(annotations).__name__}, expected a list")
    except MALFORMED as error:
        skipped.append(f"'{case.key}': {problem(error)}")
        return
    for number, annotation in enumerate(annotations[:limit]):
        yield f"'{case.key}', annotation {number}", annotation


def _point(annotation: Mapping[str, Any], mask_HW: np.ndarray) -> tuple[float, float]:
    if annotation.get("point_coords") is None:
        if not mask_HW.any():
            raise ValueError("its mask is empty, so it has no point")
        return innermost(mask_HW)
    x, y = (float(v) for v in annotation["point_coords"][0])
    height, width = mask_HW.shape
    if not (math.isfinite(x) and math.isfinite(y) and 0 <= x <= width and 0 <= y <= height):
        raise ValueError(f"its point ({x:g}, {y:g}) lies outside the image of {[height, width]}")
    return x, y


@torch.inference_mode()
def _scores(head: PromptHead, case: Sa1bCase, points_P2: np.ndarray, truth: list[np.ndarray]) -> list[dict]:
    embedding = case.embedding.to(next(head.parameters()).device)
    xy_P2 = points_P2 * [case.resized[1] / case.original[1], case.resized[0] / case.original[0]]
    xy_P12 = torch.from_numpy(xy_P2.astype(np.float32))[:, None].to(embedding.device)
    labels = torch.ones(len(xy_P12), 1, dtype=torch.int, device=embedding.device)
    logits, predicted = image_decoder(head, embedding)(xy_P12, labels, multimask=True)
    scores = []
    for mask_HW, logits_Mnn, picked in zip(truth, logits, predicted.argmax(1).tolist(), strict=True):
        # one prompt at a time: SA-1B's images have millions of pixels
        predicted_MHW = head.upsample(logits_Mnn[None], case.resized, case.original)[0] > 0
        truth_MHW = torch.from_numpy(mask_HW).to(embedding.device).expand_as(predicted_MHW)
        iou_M = iou(pack(truth_MHW), pack(predicted_MHW))
        scores.append({"key": case.key, "picked": float(iou_M[picked]), "best": float(iou_M.max())})
    return scores
