"""Compare the IoU that a student's decoder predicts for its masks with the IoU that they have.

Letters: P prompts, M = 4 masks of a prompt, H x W original pixels, n the low resolution's side, N images, B bins,
X values of all prompts and masks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor, nn

from fmdistill import images as image_sources
from fmdistill import stop
from fmdistill.backbones.iou_correction import IouCorrection
from fmdistill.evaluate import intervals, results, segmenters, truth
from fmdistill.evaluate.clicks import first_click
from fmdistill.evaluate.grid_miou import grid_points
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.mask_choice import binary
from fmdistill.evaluate.masks import Bits, iou, join, pack
from fmdistill.evaluate.results import STUDENT, TEACHER, Judged, Metric, Row
from fmdistill.evaluate.segmenters import ImageSegmenter, SegmentedImage, Segmenters
from fmdistill.evaluate.stored_results import Partial
from fmdistill.evaluate.truth.instances import MALFORMED, JoinedTruth, Skip, problem
from fmdistill.logs import log
from fmdistill.recipe import Component, Recipe
from fmdistill.registry import UserError

MASKS = {"0": slice(0, 1), "1-3": slice(1, 4)}  # SAM's mask of one, and its three masks
CORRECTED_MASKS = "1-3"
PIXELS = 2**26  # of masks that are in memory at once
FOLDS = 5
BOUNDS = (-3.0, 3.0)  # of the exponent's logarithm
DIGITS = 6  # stored of each value
RELIABILITY = (
    "Reliability: the mean IoU that the decoder predicts for the masks of a bin, and the mean that they have; the same "
    "if it is calibrated."
)
ECE = "Expected calibration error × 100: the mean distance of the two means, each bin weighted by its masks."
BIAS = "Mean of predicted minus real IoU × 100: above 0, the decoder is too sure."
SPEARMAN = "Spearman's rank correlation × 100 of predicted and real IoU over all masks."
SKIPPED = "Skipped: annotations that could not be judged, by reason."
CORRECTED = "corrected: predicted IoU of masks 1 to 3 raised to a power, fitted on the other images in 5 folds."

Batch = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]  # points (P, 2) or boxes (P, 4), masks (P, H, W)
Object = tuple[np.ndarray, tuple[float, float], tuple[float, ...]]  # mask (H, W), click (x, y), box (x, y, x, y)


@dataclass(frozen=True)
class Calibration:
    """Predicted IoU against the IoU of the same mask, logits > 0 at the original resolution.

    Without `truth`, prompts are a grid of points and a mask is compared with the teacher's mask of the same index; with
    it, each annotated object's `prompt` is one, and its mask is compared with, also the teacher's. Two empty masks have
    IoU 1. Bins divide predicted IoU from 0 to 1; values outside belong to the first or the last. `ece` with the
    dimension `corrected` tells what a power of the predicted IoU of masks 1 to 3 would change.
    """

    grid: int = 8  # points a side, without truth
    bins: int = 10
    truth: Component | None = None  # where annotations are from: coco, lvis, sa1b or labels
    annotations: str | None = None  # their file or folder
    prompt: Literal["click", "box"] = "click"  # at the pixel furthest from the object's edge, or its box
    images: Component | None = None  # the source of the images; null means the recipe's validation images
    limit: int | None = None  # judge only the first images
    teacher: bool = False  # run the teacher too if the images are not those of the recipe's cache
    prompts_per_batch: int = 64
    device: str = "auto"

    metrics: ClassVar[Mapping[str, Metric]] = {
        "ece": Metric("ECE", across="mask", percent=True, better="lower", end=0.0, help=ECE),
        "bias": Metric("predicted - real IoU", across="mask", percent=True, end=0.0, help=BIAS),
        "spearman": Metric("rank correlation", across="mask", percent=True, better="higher", end=1.0, help=SPEARMAN),
        "predicted_iou": Metric("predicted", across="mask", percent=True, shown=False, help=RELIABILITY),
        "real_iou": Metric("real", across="mask", percent=True, shown=False, help=RELIABILITY),
        "skipped": Metric("skipped", across="reason", better="lower", help=SKIPPED),
    }
    dimensions: ClassVar[Mapping[str, str]] = {"corrected": CORRECTED}
    splits: ClassVar[tuple[str, ...]] = ("train", "validation")  # a source without validation images is taken whole
    own_decoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise a UserError for settings that measure nothing."""
        for name in ("grid", "bins", "limit", "prompts_per_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value}: needs at least 1")
        if self.truth is None and (self.annotations is not None or self.prompt == "box"):
            raise UserError("annotations and prompt=box: need annotations; set truth.name=coco, lvis, sa1b or labels")
        if self.truth is not None:
            if self.truth.get("name") == "teacher":
                raise UserError("truth.name=teacher: masks are compared with the teacher's without truth; leave it out")
            truth.build(self.truth, self.annotations)
        if self.images is not None:
            image_sources.check(self.images)

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a recipe whose run makes no masks."""
        segmenters.check("calibration", recipe, self.teacher)

    def check_images(self, recipe: Recipe) -> None:
        """Raise a UserError if the annotations' file or folder is missing."""
        if self.truth is not None:
            truth.build(self.truth, self.annotations).check()

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module], partial: Partial | None = None) -> Judged:
        """Compare for the students by name, and with annotations for their teacher, on all images.

        Images whose results `partial` already has are skipped.
        """
        self.check_images(recipe)
        opened = Segmenters.open(recipe, students, self.images, self.teacher, self.device)
        if TEACHER not in opened.subjects and self.truth is None:
            raise UserError(
                "calibration: the teacher is not at hand; use its cache's images, set teacher=true, or name annotations"
            )
        joined = None if self.truth is None else truth.build(self.truth, self.annotations).join(opened.names)
        names = list(opened.names if joined is None else joined.images)[: self.limit]
        judged = opened.judge_each("calibration", names, lambda image: judge_image(self, image, joined), partial)
        return _summary(self, judged, joined.skipped if joined is not None else ())

    def store_in(self, run: Path, weights: Path, result: Mapping[str, Any]) -> None:
        """Write the student's power into the run's folder, so that its predictor and its exports correct by it."""
        (power,) = (entry["exponent"] for entry in result["exponents"] if entry["subject"] == STUDENT)
        if not BOUNDS[0] + 0.01 < np.log(power) < BOUNDS[1] - 0.01:
            raise UserError(f"store=true: no power corrects this run; the best, {power:.4g}, ends the range of the fit")
        errors = [row for row in result["rows"] if (row["subject"], row["metric"]) == (STUDENT, "ece")]
        described = {"masks": [1, 2, 3], "protocol": result["protocol"], "errors": errors}
        path = IouCorrection(power).store(run, weights, described)
        log.info("%s: predicted IoU of masks 1 to 3 is raised to the power %.4g from now on", path, power)
        if self.truth is None:
            log.warning(
                "%s: was fitted on agreement with the teacher's masks, so predicted IoU no longer says how well a mask "
                "fits an object; set truth.name and annotations, or delete the file", path,
            )  # fmt: skip


def expected_error(predicted_X: np.ndarray, real_X: np.ndarray, bins: int = 10) -> float:
    """Return the expected calibration error: the mean of |mean predicted - mean real| over bins, weighted by size."""
    return float(np.abs(_gaps(predicted_X, real_X, bins)).sum() / len(predicted_X))


def fit(predicted_X: np.ndarray, real_X: np.ndarray) -> IouCorrection:
    """Return the power of the predicted IoU with the least mean squared difference from the real one."""

    def error(log_exponent: float) -> float:
        corrected_X = IouCorrection(float(np.exp(log_exponent)))(predicted_X)
        return float(np.square(corrected_X - real_X).mean())

    best: Any = optimize.minimize_scalar(error, bounds=BOUNDS, method="bounded")
    return IouCorrection(float(np.exp(best.x)))


def cross_fitted(predicted: Sequence[np.ndarray], real: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the predicted IoU (P, M) of each image, corrected by a fit on the images of the other folds."""
    corrections = []
    for fold in range(min(FOLDS, len(predicted))):
        others = [number for number in range(len(predicted)) if number % FOLDS != fold]
        corrections.append(fit(*(np.concatenate([arrays[i].ravel() for i in others]) for arrays in (predicted, real))))
    return [corrections[number % FOLDS](values) for number, values in enumerate(predicted)]


def judge_image(protocol: Calibration, image: SegmentedImage, joined: JoinedTruth | None) -> dict[str, Any]:
    """Return the predicted and the real IoU (P, 4) of each subject's masks, for JSON."""
    skipped: list[list[str]] = []
    values: dict[str, dict[str, list]] = {name: {"predicted": [], "real": []} for name in image.segmenters}
    if joined is None:
        values.pop(TEACHER)
        batches = _grid(protocol, image)
    else:
        batches = _batches(protocol, image, _objects(image, joined, skipped))
    for points, boxes, masks_PHW in stop.between(batches):
        reference = None if masks_PHW is None else pack(torch.from_numpy(masks_PHW))
        if reference is None:
            reference = _answer(image.segmenters[TEACHER], points, boxes)[1]
        for name, pairs in values.items():
            predicted_P4, own = _answer(image.segmenters[name], points, boxes)
            repeats = len(own) // len(reference)  # the teacher has a mask of each index, an object one for all
            real_P4 = iou(_repeated(reference, repeats), own).reshape(predicted_P4.shape)
            pairs["predicted"] += predicted_P4.round(DIGITS).tolist()
            pairs["real"] += real_P4.round(DIGITS).tolist()
    return {"values": values, "skipped": skipped}


def _grid(protocol: Calibration, image: SegmentedImage) -> Iterator[Batch]:
    points_P2 = grid_points(protocol.grid, image.original)
    for start in range(0, len(points_P2), protocol.prompts_per_batch):
        yield points_P2[start : start + protocol.prompts_per_batch], None, None


def _batches(protocol: Calibration, image: SegmentedImage, objects: Iterator[Object]) -> Iterator[Batch]:
    """Yield as many objects at a time as the protocol says, fewer if their masks would take much memory."""
    step = max(1, min(protocol.prompts_per_batch, PIXELS // (image.original[0] * image.original[1])))
    while batch := list(islice(objects, step)):
        masks, points, boxes = zip(*batch, strict=True)
        click = protocol.prompt == "click"
        yield np.array(points) if click else None, None if click else np.array(boxes), np.stack(masks)


def _objects(image: SegmentedImage, joined: JoinedTruth, skipped: list[list[str]]) -> Iterator[Object]:
    """Yield the mask, the click and the box (x, y, x, y) of each object that is no crowd; others are skipped."""
    annotated = joined.of(image)
    skipped += [list(skip) for skip in annotated.skipped]
    for one in annotated.instances:
        place = f"{image.name}, annotation {one.id}"
        try:
            mask_HW = one.mask(image.original)
        except MALFORMED as error:
            skipped.append(list(Skip("mask malformed", f"{place}: {problem(error)}")))
            continue
        if one.crowd or not mask_HW.any():
            skipped.append(list(Skip("crowd" if one.crowd else "mask empty", place)))
            continue
        click = first_click("mask_centre", one, mask_HW, (1.0, 1.0))
        x, y, width, height = one.box
        yield mask_HW, (click.x, click.y), (x, y, x + width, y + height)


def _answer(segmenter: ImageSegmenter, points_P2: Any, boxes_P4: Any) -> tuple[np.ndarray, Bits]:
    """Return the predicted IoU (P, 4) of each prompt's four masks, and the masks, prompt by prompt."""
    prompts: dict[str, Any] = {"boxes": boxes_P4}
    if points_P2 is not None:
        prompts |= {"points": points_P2[:, None], "labels": np.ones((len(points_P2), 1))}
    answers = [segmenter.decode(**prompts, multimask=multimask) for multimask in (False, True)]
    logits_PMnn, predicted_PM = (torch.cat(parts, dim=1) for parts in zip(*answers, strict=True))
    return predicted_PM.double().cpu().numpy(), _bits(segmenter, logits_PMnn.flatten(0, 1))


def _bits(segmenter: ImageSegmenter, logits_Xnn: Tensor) -> Bits:
    pieces = binary(segmenter.head, logits_Xnn, segmenter.original, segmenter.resized, "original")
    return join([pack(piece.cpu()) for piece in pieces])


def _repeated(masks: Bits, times: int) -> Bits:
    assert isinstance(masks, np.ndarray)
    return masks.repeat(times, axis=0)


def _summary(protocol: Calibration, judged: Mapping[str, dict[str, Any]], skips: Sequence[Skip]) -> Judged:
    """Return rows of every subject and kind of mask, and details: the fitted power of each subject."""
    skipped = [*skips, *(Skip(*skip) for result in judged.values() for skip in result["skipped"])]
    values: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name, result in judged.items():
        for subject, pairs in result["values"].items():
            if pairs["real"]:
                values.setdefault(subject, {})[name] = (np.array(pairs["predicted"]), np.array(pairs["real"]))
    if not values:
        raise UserError(f"calibration: no prompts to judge on {len(judged)} images; skipped {len(skipped)}")
    rows: list[Row] = []
    powers, all_means = [], Means()
    for subject, by_image in values.items():
        for mask, part in MASKS.items():
            predicted, real = ([pair[i][:, part] for pair in by_image.values()] for i in (0, 1))
            versions = {None: predicted}
            if mask == CORRECTED_MASKS:
                power = fit(*(np.concatenate(arrays).ravel() for arrays in (predicted, real)))
                powers.append({"subject": subject, "exponent": power.exponent})
                versions |= {"corrected": cross_fitted(predicted, real)} if len(predicted) > 1 else {}
            for corrected, values_NPM in versions.items():
                pairs = {image: (x.ravel(), y.ravel()) for image, x, y in zip(by_image, values_NPM, real, strict=True)}
                rows += _figures(protocol, subject, list(pairs.values()), mask=mask, corrected=corrected)
                _add(protocol, all_means, subject, pairs, mask=mask, corrected=corrected)
    rows += all_means.rows()
    reasons = [skip.reason for skip in skipped]
    rows += [
        results.row(subject, "skipped", reasons.count(reason), reason=reason)
        for subject in values
        for reason in dict.fromkeys(reasons)
    ]
    return rows, {**all_means.details(), "exponents": powers, "skipped": [": ".join(skip) for skip in skipped[:50]]}


def _figures(
    protocol: Calibration, subject: str, pairs: list[tuple[np.ndarray, np.ndarray]], **dimensions: str | None
) -> Iterator[Row]:
    """Yield the calibration error with its interval, and the rank correlation, which a correction cannot change."""
    x_X, y_X = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    row = results.row(subject, "ece", expected_error(x_X, y_X, protocol.bins), len(x_X), **dimensions)
    if len(pairs) > 1:
        gaps_NB = np.stack([_gaps(*pair, protocol.bins) for pair in pairs])
        counts_N = np.array([len(x) for x, _ in pairs])
        resampled = [np.abs(w_rN @ gaps_NB).sum(1) / (w_rN @ counts_N) for w_rN in intervals.resamples(len(pairs))]
        row = intervals.with_interval(row, np.concatenate(resampled), len(pairs))
    yield row
    if dimensions["corrected"] is None and min(np.ptp(x_X), np.ptp(y_X)) > 0:
        rank: Any = stats.spearmanr(x_X, y_X)
        yield results.row(subject, "spearman", rank.statistic, len(x_X), mask=dimensions["mask"])


def _add(
    protocol: Calibration,
    means: Means,
    subject: str,
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    **dimensions: str | None,
) -> None:
    """Add the bias, and the two means of each bin, of the predicted and real IoU of each image."""
    for image, (x_X, y_X) in pairs.items():
        means.add(image, subject, "bias", x_X - y_X, **dimensions)
    for number in range(protocol.bins):
        name = f"{number / protocol.bins:g}-{(number + 1) / protocol.bins:g}"
        for image, (x_X, y_X) in pairs.items():
            members_X = _bin(x_X, protocol.bins) == number
            means.add(image, subject, "predicted_iou", x_X[members_X], bin=name, **dimensions)
            means.add(image, subject, "real_iou", y_X[members_X], bin=name, **dimensions)


def _bin(predicted_X: np.ndarray, bins: int) -> np.ndarray:
    return np.clip(np.floor(predicted_X * bins), 0, bins - 1).astype(int)


def _gaps(predicted_X: np.ndarray, real_X: np.ndarray, bins: int) -> np.ndarray:
    """Return the sum of predicted - real of each bin, float64 (B,)."""
    return np.bincount(_bin(predicted_X, bins), weights=predicted_X - real_X, minlength=bins)
