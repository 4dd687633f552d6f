"""Score the masks that students make of whole images without prompts against their teacher's, and annotated objects.

Letters: T masks of the teacher, S masks of a student, A ranges of area, R IoU thresholds of COCO, D detections.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment
from torch import nn

from fmdistill import images as image_sources
from fmdistill import stop
from fmdistill.evaluate import results, segmenters, truth
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.masks import to_rle
from fmdistill.evaluate.matching import ALL, AREAS, Rules, match
from fmdistill.evaluate.results import TEACHER, Judged, Metric, Row
from fmdistill.evaluate.segmenters import ImageSegmenter, SegmentedImage, Segmenters
from fmdistill.evaluate.stored_results import Partial
from fmdistill.evaluate.truth.instances import MALFORMED, JoinedTruth, Skip, problem
from fmdistill.predict.everything import masks_of_embedding
from fmdistill.recipe import Component, Recipe
from fmdistill.registry import UserError

SHOWN = 50  # skipped places in a result
RECALL = (
    "Share × 100 of the teacher's automatic masks that a mask of the student covers with at least this IoU. Masks are "
    "paired one to one, so that the sum of the IoU is the largest."
)
MATCHED = "Mean IoU × 100 of the pairs that reach the lowest of these IoU."
COUNTS = "Number of the student's automatic masks divided by the teacher's, on images on which the teacher makes any."
PER_IMAGE = "Number of automatic masks of an image."
AVERAGE = (
    "AR: share × 100 of the annotated objects that an automatic mask covers, the mean over IoU of 0.50 to 0.95, "
    "without classes, with at most so many masks an image, the best by predicted IoU."
)
NO_MASKS = "Images on which the teacher makes no mask: they say nothing of recall."
SKIPPED = "Skipped: annotations that could not be judged, by reason."
SIZE = "Size: objects by annotated area as COCO divides them, small to 32², medium to 96², large above, in pixels."


@dataclass(frozen=True)
class AutomaticMasks:
    """Settings of segment_anything's SamAutomaticMaskGenerator for a whole image, with its defaults."""

    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    points_per_batch: int = 64

    def __post_init__(self) -> None:
        """Raise a UserError for settings that make no masks."""
        for name in ("points_per_side", "points_per_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: needs at least 1")
        for name in ("stability_score_thresh", "box_nms_thresh"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: expected 0 to 1")

    def of(self, segmenter: ImageSegmenter) -> list[dict[str, Any]]:
        """Return the masks of one image as the generator does, in its order, their `segmentation` as COCO's RLE."""
        settings = {field.name: getattr(self, field.name) for field in fields(AutomaticMasks)}
        return masks_of_embedding(
            segmenter.head, segmenter.embedding, segmenter.original, output_mode="coco_rle", **settings
        )


@dataclass(frozen=True)
class Everything(AutomaticMasks):
    """Recall of the teacher's automatic masks by the student's, and AR of annotated objects.

    Both make masks at a grid of points with the same settings. `recall` is of the teacher's masks at each of `ious`,
    `matched_miou` the mean IoU of the pairs that reach the lowest of them, `count_ratio` the student's number of masks
    to the teacher's; masks are paired one to one by the largest sum of IoU. With `truth` and `annotations` also
    `ar`, COCO's average recall of annotated objects without classes, by at most `max_dets` masks an image.
    """

    ious: tuple[float, ...] = (0.5, 0.75)
    truth: Component | None = None  # where annotations are from: coco, lvis, sa1b or labels
    annotations: str | None = None  # their file or folder
    max_dets: int = 1000
    images: Component | None = None  # the source of the images; null means the recipe's validation images
    limit: int | None = None  # judge only the first images
    teacher: bool = False  # run the teacher too if the images are not those of the recipe's cache
    device: str = "auto"

    metrics: ClassVar[Mapping[str, Metric]] = {
        "recall": Metric("recall", across="iou", percent=True, better="higher", end=1.0, help=RECALL),
        "matched_miou": Metric("mIoU", "of pairs", percent=True, better="higher", end=1.0, help=MATCHED),
        "count_ratio": Metric("masks", "to the teacher's", help=COUNTS),
        "masks": Metric("masks", "per image", help=PER_IMAGE),
        "ar": Metric("AR", across="max_dets", percent=True, better="higher", end=1.0, help=AVERAGE),
        "without_masks": Metric("images", "without masks", help=NO_MASKS),
        "skipped": Metric("skipped", across="reason", better="lower", help=SKIPPED),
    }
    dimensions: ClassVar[Mapping[str, str]] = {"size": SIZE}
    splits: ClassVar[tuple[str, ...]] = ("train", "validation")  # a source without validation images is taken whole
    own_decoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise a UserError for settings that measure nothing."""
        super().__post_init__()
        if not self.ious or not all(0 < iou <= 1 for iou in self.ious):
            raise UserError(f"ious={list(self.ious)}: needs IoU thresholds above 0, at most 1")
        for name in ("limit", "max_dets"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value}: needs at least 1")
        if self.truth is None and self.annotations is not None:
            raise UserError(
                f"annotations={self.annotations}: of which format? Set truth.name=coco, lvis, sa1b or labels"
            )
        if self.truth is not None:
            if self.truth.get("name") == "teacher":
                raise UserError("truth.name=teacher: the teacher's masks are compared anyway; leave truth out")
            truth.build(self.truth, self.annotations)
        if self.images is not None:
            image_sources.check(self.images)

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a recipe whose run makes no masks."""
        segmenters.check("everything", recipe, self.teacher)

    def check_images(self, recipe: Recipe) -> None:
        """Raise a UserError if the annotations' file or folder is missing."""
        if self.truth is not None:
            truth.build(self.truth, self.annotations).check()

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module], partial: Partial | None = None) -> Judged:
        """Score the students by name, and with annotations their teacher too, on all images.

        Images whose results `partial` already has are skipped.
        """
        self.check_images(recipe)
        opened = Segmenters.open(recipe, students, self.images, self.teacher, self.device)
        if TEACHER not in opened.subjects and self.truth is None:
            raise UserError(
                "everything: the teacher is not at hand; use its cache's images, set teacher=true, or name annotations"
            )
        joined = None if self.truth is None else truth.build(self.truth, self.annotations).join(opened.names)
        names = list(opened.names if joined is None else joined.images)[: self.limit]
        judged = opened.judge_each("everything", names, lambda image: _judge(self, image, joined), partial)
        return _summary(self, judged, list(opened.subjects), joined)


def pair(overlaps_TS: np.ndarray) -> np.ndarray:
    """Return the IoU of each of the T masks with its own of the S masks, float64 (T,), 0 if it has none.

    Pairs are one to one, so that the sum of their IoU is the largest.
    """
    paired_T = np.zeros(len(overlaps_TS))
    if overlaps_TS.size:
        rows, columns = linear_sum_assignment(overlaps_TS, maximize=True)
        paired_T[rows] = overlaps_TS[rows, columns]
    return paired_T


def overlaps(of: Sequence[Any], to: Sequence[Any]) -> np.ndarray:
    """Return the IoU of every pair of two lists of COCO's RLE, float64 (T, S); empty against empty is 1."""
    if not of or not to:
        return np.zeros((len(of), len(to)))
    empty_T, empty_S = (np.array([coco_mask.area(mask) == 0 for mask in masks]) for masks in (of, to))
    iou_TS = np.asarray(coco_mask.iou(list(of), list(to), [0] * len(to)))
    return np.where(empty_T[:, None] & empty_S, 1.0, iou_TS)


def _judge(protocol: Everything, image: SegmentedImage, joined: JoinedTruth | None) -> dict[str, Any]:
    """Return the number of masks, the IoU of the teacher's masks with their pairs, and what is recalled, for JSON."""
    masks = {name: protocol.of(segmenter) for name, segmenter in stop.between(image.segmenters.items())}
    rles = {name: [mask["segmentation"] for mask in made] for name, made in masks.items()}
    result: dict[str, Any] = {"key": image.key, "group": image.group, "iou": {}, "recalled": {}, "skipped": []}
    result["masks"] = {name: len(made) for name, made in masks.items()}
    if TEACHER in rles:
        result["iou"] = {name: pair(overlaps(rles[TEACHER], own)).tolist() for name, own in rles.items()}
    if joined is not None:
        objects = list(_objects(image, joined, result["skipped"]))
        result["recalled"] = {name: recalled(objects, made, protocol.max_dets) for name, made in masks.items()}
    return result


def recalled(
    objects: Sequence[Mapping[str, Any]], masks: Sequence[Mapping[str, Any]], most: int
) -> dict[str, tuple[float, int]]:
    """Return by size how many objects the masks recall, the mean over IoU .5 to .95, and how many objects there are.

    `objects` are annotations of COCO with masks as RLE, `masks` the generator's. Crowds are not counted. Summed over
    images, the first divided by the second is COCOeval's AR without classes, with `most` masks an image.
    """
    detections = [
        {"category_id": ALL, "segmentation": mask["segmentation"], "score": mask["predicted_iou"]} for mask in masks
    ]
    matches = match(objects, detections, Rules(limits=(most,), classes=False)).get(ALL)
    if matches is None:
        return dict.fromkeys(AREAS, (0.0, 0))
    # A detection may match a crowd, which does not count: it is ignored then.
    matched_AR = (matches.matched_ATD & ~matches.ignored_ATD).sum(2)
    return {
        area: (float(matched_R.mean()), int(count))
        for area, matched_R, count in zip(AREAS, matched_AR, matches.objects_A, strict=True)
    }


def _objects(image: SegmentedImage, joined: JoinedTruth, skipped: list[list[str]]) -> Any:
    """Yield the annotated objects of an image as annotations of COCO; damaged ones are skipped."""
    annotated = joined.of(image)
    skipped += [list(skip) for skip in annotated.skipped]
    for one in annotated.instances:
        try:
            rle = to_rle(one.mask(image.original))
        except MALFORMED as error:
            skipped.append(list(Skip("mask malformed", f"{image.name}, annotation {one.id}: {problem(error)}")))
            continue
        yield {"category_id": ALL, "segmentation": rle, "area": one.area, "iscrowd": int(one.crowd)}


def _summary(
    protocol: Everything, judged: Mapping[str, dict[str, Any]], subjects: Collection[str], joined: JoinedTruth | None
) -> Judged:
    """Return the rows of all images and groups, and details: the sums of each image, its scores, what was skipped."""
    _must_have_masks(protocol, judged)
    skipped = [
        *(joined.skipped if joined else ()),
        *(Skip(*s) for result in judged.values() for s in result["skipped"]),
    ]
    counts = Counter(skip.reason for skip in skipped)
    means, groups = Means(), sorted({result["group"] for result in judged.values()})
    for group in (None, *(groups if len(groups) > 1 else ())):
        for subject in subjects:
            for name, result in judged.items():
                if group in (None, result["group"]):
                    _add(protocol, means, name, subject, result, group)
    rows: list[Row] = means.rows()
    if any(result["iou"] for result in judged.values()):
        without = sum(not result["masks"][TEACHER] for result in judged.values())
        rows.append(results.row(TEACHER, "without_masks", without))
    rows += [results.row(subject, "skipped", n, reason=reason) for subject in subjects for reason, n in counts.items()]
    images = [
        {"key": result["key"], "group": result["group"], "subject": name, "masks": result["masks"][name]}
        | {f"recall {iou:g}": float((np.array(iou_T) >= iou).mean()) for iou in protocol.ious if iou_T}
        for result in judged.values()
        for name, iou_T in result["iou"].items()
    ]
    shown = [f"{skip.reason}: {skip.place}" for skip in skipped[:SHOWN]]
    return rows, {**means.details(), "images": images, "skipped": shown}


def _must_have_masks(protocol: Everything, judged: Mapping[str, dict[str, Any]]) -> None:
    if not judged:
        raise UserError("everything: no images to judge")
    compared = any(result["iou"] for result in judged.values())
    if compared and protocol.truth is None and not any(result["masks"][TEACHER] for result in judged.values()):
        raise UserError(
            f"everything: the teacher makes no mask on any of {len(judged)} images at pred_iou_thresh="
            f"{protocol.pred_iou_thresh}, stability_score_thresh={protocol.stability_score_thresh}; lower them, as "
            f"eval/everything_mini.yaml does"
        )


def _add(
    protocol: Everything, means: Means, image: str, subject: str, result: Mapping[str, Any], group: str | None
) -> None:
    """Add one image's scores of a subject; of the teacher only those that are not a comparison with itself."""
    masks = result["masks"]
    means.add(image, subject, "masks", [masks[subject]], group=group)
    for size, (matched, count) in result["recalled"].get(subject, {}).items():
        named = None if size == "all" else size
        means.add_sum(image, subject, "ar", matched, count, max_dets=protocol.max_dets, size=named, group=group)
    if subject == TEACHER or TEACHER not in masks:
        return
    iou_T = np.array(result["iou"][subject])
    for iou in protocol.ious:
        means.add(image, subject, "recall", iou_T >= iou, iou=iou, group=group)
    means.add(image, subject, "matched_miou", iou_T[iou_T >= min(protocol.ious)], group=group)
    means.add_sum(image, subject, "count_ratio", masks[subject], masks[TEACHER], group=group)
