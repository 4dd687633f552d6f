"""Score segmenters by COCO's or LVIS's average precision of their masks for a detector's boxes."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn

from fmdistill import images as image_sources
from fmdistill import stop
from fmdistill.evaluate import detections, faster_precision, intervals, results, segmenters
from fmdistill.evaluate.box_masks import Select, segment, with_masks
from fmdistill.evaluate.detections import Boxes, Detections
from fmdistill.evaluate.faster_precision import FasterPrecision
from fmdistill.evaluate.matching import Rules
from fmdistill.evaluate.precision import INTERVAL, Precision, interval
from fmdistill.evaluate.results import Judged, Metric, Row
from fmdistill.evaluate.segmenters import Segmenters
from fmdistill.evaluate.stored_results import Partial
from fmdistill.evaluate.truth import build as build_truth
from fmdistill.evaluate.truth import datasets
from fmdistill.evaluate.truth.instances import JoinedTruth, Skip
from fmdistill.logs import log, progress
from fmdistill.recipe import Component, Recipe
from fmdistill.registry import UserError

Score = Literal["detector", "product"]
Scorer = Literal["pycocotools", "faster_coco_eval"]

SHOWN = 50  # skipped places in a result
RESAMPLED = "resampled"  # the name of the stored resamples among a result's details
HELP = (
    "Average precision × 100 of the masks for a detector's boxes, with its classes and scores: the mean over classes "
    "and over IoU thresholds of 0.50 to 0.95, or at one (AP50, AP75); APs, APm, APl by the object's area, APr, APc, "
    "APf by the frequency of LVIS's classes. AR@N: recall of the N best detections."
)
SKIPPED = "Skipped: annotations, images and boxes that could not be judged, by reason."
BOUNDARY_HELP = "The same with the smaller of mask IoU and the IoU of bands along the outlines."


@dataclass(frozen=True)
class CocoAp:
    """Average precision of one mask a box, on COCO's or LVIS's annotations; logits > 0 at the original resolution.

    `boxes` is a detector's JSON in COCO's results layout, whose classes and scores count; null prompts with the boxes
    of the annotated objects that are no crowds, with score 1. `select` chooses the mask: `single` = mask 0;
    `best_predicted` = of masks 1 to 3 the one with the highest predicted IoU. `score` is the detector's, or its
    `product` with the predicted IoU. `max_dets` are COCO's limits of detections for each class and image; the last one
    limits precision, and LVIS's limit is of the image. LVIS's rules come with `truth: {name: lvis}`: boxes of a class
    whose presence on the image nobody stated do not count. Intervals are of 200 resamples of the images.
    """

    truth: Component  # where the annotations are from: coco or lvis; without classes also sa1b, labels, teacher
    annotations: str | None = None  # their file or folder
    dataset: str | None = None  # the data set that they must be, whole, so that published figures apply
    images: Component | None = None  # the source of the images; null means the recipe's validation images
    limit: int | None = None  # judge only the first images
    teacher: bool = False  # run the teacher too if the images are not those of the recipe's cache
    boxes: str | None = None  # a detector's JSON
    detector: str | None = None  # whose boxes they are; published figures stand only beside those of the same
    select: Select = "best_predicted"
    score: Score = "detector"
    max_dets: tuple[int, ...] = (1, 10, 100)
    classes: bool = True  # whether a detection must have the object's class
    boundary: bool = False  # add boundary AP
    dilation: float = 0.02  # width of the boundary as a share of the image's diagonal
    scorer: Scorer = "pycocotools"  # faster_coco_eval gives the same figures sooner, without intervals
    write_masks: bool = False  # store the detections with their masks in COCO's results layout
    boxes_per_batch: int = 64
    device: str = "auto"

    splits: ClassVar[tuple[str, ...]] = ("train", "validation")  # a source without validation images is taken whole
    own_decoder: ClassVar[bool] = True

    @property
    def metrics(self) -> dict[str, Metric]:
        """How each figure reads."""
        most = self.max_dets[-1]
        names = ["AP", "AP50", "AP75", *(f"AP{letter}" for letter in "smlrcf")]
        names += [*(f"AR@{limit}" for limit in self.max_dets), *(f"AR{letter}@{most}" for letter in "sml")]
        kinds = {"": ("mask", HELP), "boundary_": ("boundary", BOUNDARY_HELP)}
        return {
            prefix + name: Metric(kind, name, percent=True, better="higher", end=1.0, help=text)
            for prefix, (kind, text) in kinds.items()
            for name in names
        } | {"skipped": Metric("skipped", across="reason", better="lower", help=SKIPPED)}

    def __post_init__(self) -> None:
        """Raise a UserError for settings that measure nothing, and for a missing scorer."""
        if not self.max_dets or min(self.max_dets) < 1 or list(self.max_dets) != sorted(set(self.max_dets)):
            raise UserError(f"max_dets={list(self.max_dets)}: needs numbers of 1 or more in ascending order")
        for name, value in (("boxes_per_batch", self.boxes_per_batch), ("limit", self.limit)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: needs at least 1")
        if not 0 < self.dilation < 1:
            raise UserError(f"dilation={self.dilation}: is a share of the image's diagonal, above 0 and below 1")
        if self.images is not None:
            image_sources.check(self.images)
        if self.detector is not None and self.boxes is None:
            raise UserError(f"detector={self.detector}: whose boxes? Name their file by boxes=FILE")
        datasets.check_name(self.dataset)
        build_truth(self.truth, self.annotations)
        if self.scorer == "faster_coco_eval":
            faster_precision.check_installed()

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a recipe whose run makes no masks."""
        segmenters.check("coco_ap", recipe, self.teacher)

    def check_images(self, recipe: Recipe) -> None:
        """Raise a UserError if the annotations' file or folder, or the file of boxes, is missing."""
        build_truth(self.truth, self.annotations).check()
        if self.boxes is not None and not Path(self.boxes).expanduser().is_file():
            raise UserError(f"boxes={self.boxes}: no such file; name a detector's JSON, {detections.LAYOUT}")

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module], partial: Partial | None = None) -> Judged:
        """Score the students by name, and their teacher if it is at hand, in one pass over the images.

        Images whose masks `partial` already has are skipped.
        """
        self.check_images(recipe)
        opened = Segmenters.open(recipe, students, self.images, self.teacher, self.device)
        joined = build_truth(self.truth, self.annotations).join(opened.names)
        datasets.check_whole(self.dataset, joined)
        rules, detected = self._rules(joined), self._boxes(joined)
        names = list(joined.images)[: self.limit]
        done = dict(partial.done) if partial is not None else {}
        if done:
            log.info("coco_ap: %d of %d images were judged before the last stop", len(done), len(names))
        remaining = opened.images([name for name in names if name not in done])
        tracked = progress(remaining, "coco_ap", total=len(names), initial=len(done), unit="image")
        for image in stop.between(tracked):
            boxes = None if detected is None else detected.by_image.get(joined.ids[image.name], Boxes())
            result = segment(image, joined.of(image), boxes, rules, self.select, self.boxes_per_batch)
            if partial is not None:
                partial.add(image.name, result)
            done[image.name] = result
        ids = joined.ids or {name: number for number, name in enumerate(names)}
        judged = {ids[name]: done[name] for name in sorted(names, key=lambda name: ids[name])}
        rows, details = run(self, rules, judged, joined)
        skipped = [*joined.skipped, *(Skip(*skip) for result in judged.values() for skip in result["skipped"])]
        counts = Counter(skip.reason for skip in skipped) + Counter({} if detected is None else detected.skipped)
        if counts:
            log.warning("coco_ap: skipped %s", ", ".join(f"{n} ({reason})" for reason, n in counts.items()))
        rows += [
            results.row(name, "skipped", n, reason=reason) for name in opened.subjects for reason, n in counts.items()
        ]
        return rows, {**details, "skipped": [f"{skip.reason}: {skip.place}" for skip in skipped[:SHOWN]]}

    def _rules(self, joined: JoinedTruth) -> Rules:
        """Return the rules of the truth; objects without classes match detections of any class."""
        return Rules(self.max_dets, self.truth["name"] == "lvis", self.classes and bool(joined.categories))

    def _boxes(self, joined: JoinedTruth) -> Detections | None:
        if self.boxes is None:
            return None
        if not joined.ids:
            raise UserError(
                f"boxes={self.boxes}: are joined with images by COCO's ids, which truth.name=coco or lvis has"
            )
        return detections.read(self.boxes, joined.ids.values(), joined.categories if self.classes else None)


def run(protocol: CocoAp, rules: Rules, judged: Mapping[int, Mapping[str, Any]], joined: JoinedTruth) -> Judged:
    """Return rows of AP and AR by subject for the results of `segment` by image id, ascending; and details.

    Details are the figures of each resample, and the detections in COCO's results layout if the protocol writes them.
    """
    used = {image: result for image, result in judged.items() if "masks" in result}
    if not used:
        raise UserError("coco_ap: no images to evaluate; none has annotations of its size")
    rows: list[Row] = []
    details: dict[str, Any] = {RESAMPLED: []}
    digest = hashlib.sha256(repr(list(used)).encode()).hexdigest()[:16]
    frequencies = {number: category.frequency or "" for number, category in joined.categories.items()}
    for subject in next(iter(used.values()))["masks"]:
        masks = {image: _detections(result, subject, protocol.score) for image, result in used.items()}
        for prefix, ratio in {"": None, **({"boundary_": protocol.dilation} if protocol.boundary else {})}.items():
            figures, resampled = _figures(protocol, replace(rules, boundary=ratio), frequencies, used, masks)
            rows += [_row(subject, prefix + name, figures[name], len(used), resampled.get(name)) for name in figures]
            if "AP" in resampled:
                of = {"subject": subject, "metric": f"{prefix}AP", "images": digest, "count": len(used)}
                details[RESAMPLED].append({**of, "values": resampled["AP"].tolist()})
        if protocol.write_masks:
            written = [{"image_id": image, **one} for image, entries in masks.items() for one in entries]
            details.setdefault("masks", []).extend({"subject": subject, **one} for one in written)
    return [row for row in rows if not math.isnan(row["value"])], details


def paired(of: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the interval of the difference of two subjects' AP; None unless they were judged on the same images.

    Each is an entry of the details `resampled`: both are of the same resamples.
    """
    if of["images"] != base["images"] or of["metric"] != base["metric"]:
        return None
    return intervals.ends(np.subtract(of["values"], base["values"]), of["count"])


def _detections(result: Mapping[str, Any], subject: str, score: Score) -> list[dict[str, Any]]:
    """Return the subject's detections on an image in COCO's results layout."""
    entries = with_masks(result["detections"], result["masks"][subject], result["size"])
    if score == "product":
        pairs = zip(entries, result["predicted"][subject], strict=True)
        return [{**one, "score": one["score"] * predicted} for one, predicted in pairs]
    return entries


def _figures(
    protocol: CocoAp,
    rules: Rules,
    frequencies: Mapping[int, str],
    used: Mapping[int, Mapping[str, Any]],
    masks: Mapping[int, Sequence[dict[str, Any]]],
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return figures by name, and each one's resamples, none of a single image or from faster-coco-eval."""
    scorer = (Precision if protocol.scorer == "pycocotools" else FasterPrecision)(rules, frequencies)
    for image, result in used.items():
        objects = with_masks(result["objects"], result["truth"], result["size"])
        scorer.add(objects, masks[image], result["unfinished"])
    resamples = scorer.resampled() if isinstance(scorer, Precision) and len(used) > 1 else {}
    return scorer.figures(), resamples


def _row(subject: str, name: str, value: float, images: int, resampled_R: np.ndarray | None) -> Row:
    row = results.row(subject, name, value, images)
    if resampled_R is None or math.isnan(value):  # a resample may lack all objects of a figure, and then is NaN
        return row
    low, high = interval(value, resampled_R, images)
    return {**row, "low": low, "high": high, "interval": INTERVAL}
