"""Score students and their teacher by prompts made from annotations: boxes, a first click, or a series of clicks.

Letters: P prompts, H x W original pixels.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn

from fmdistill import images as image_sources
from fmdistill import stop
from fmdistill.evaluate import prompt_rounds, results, segmenters, truth
from fmdistill.evaluate.clicks import FirstClick, NextClick, first_click, nearest, widened
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.mask_choice import Resolution, binary, choose
from fmdistill.evaluate.prompt_rounds import Advance, Answering, Select, Target
from fmdistill.evaluate.results import TEACHER, Judged, Metric, Row
from fmdistill.evaluate.segmenters import SegmentedImage, Segmenters
from fmdistill.evaluate.stored_results import Partial
from fmdistill.evaluate.truth import datasets
from fmdistill.evaluate.truth.instances import MALFORMED, Box, Instance, JoinedTruth, Skip, problem
from fmdistill.logs import log, progress
from fmdistill.recipe import Component, Recipe
from fmdistill.registry import UserError

SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, float("inf"))}  # COCO's, inclusive
PIXELS = 2**27  # of the truths of one batch
SHOWN = 50  # skipped places in a result
MIOU = (
    "mIoU × 100 with the annotated masks, the mean over all objects, for prompts made from the annotations (their "
    "boxes, or so many clicks)."
)
PER_IMAGE_HELP = "mIoU per image: the mean of the images' means."
SKIPPED = "Skipped: annotations and images that could not be judged, by reason."
SIZE = "Size: objects by annotated area as COCO divides them, small to 32², medium to 96², large above, in pixels."


@dataclass(frozen=True)
class PromptedMiou:
    """Mean IoU of masks, logits > 0, with annotated ones, for prompts made from the annotations.

    Every setting changes the figures; the protocols in eval/ state all of them. `truth` names the annotations and
    `annotations` their file or folder. With `against: teacher`, masks are compared with the teacher's for an
    instance's first prompt instead of the annotated one. Annotations that cannot be used are skipped and counted.
    """

    truth: Component  # where the annotations are from: coco, lvis, sa1b, labels, or the masks of the teacher
    annotations: str | None = None  # their file or folder
    dataset: str | None = None  # the data set that they must be, whole, so that published figures apply
    images: Component | None = None  # the source of the images; null means the recipe's validation images
    limit: int | None = None  # judge only the first images
    teacher: bool = False  # run the teacher too if the images are not those of the recipe's cache
    prompt: Literal["box", "click"] = "box"
    boxes: str | None = (
        None  # a JSON list of {"id": annotation, "bbox": [x, y, width, height]} in place of the annotated
    )
    clicks: tuple[int, ...] = (0,)  # after how many clicks masks are scored; 0 is a box alone
    first_click: FirstClick = "mask_centre"
    next_click: NextClick = "largest_error"
    mask_input: bool = False  # whether the logits of a mask are a prompt of the next click
    select: Select = "best_predicted"  # single is mask 0, oracle the best of masks 1 to 3 against the truth
    resolution: Resolution = "original"
    against: Literal["truth", "teacher"] = "truth"
    crowd: Literal["keep", "drop"] = "keep"  # annotations with iscrowd = 1
    min_area: float = 1.0  # pixels; instances of a smaller stated area are left out
    per_image: int | None = None  # at most so many instances of an image
    draw: Literal["first", "with_replacement"] = "first"  # which of them
    widen_truth: bool = False  # resize the truth to the network's input and back, as EdgeSAM's evaluation
    seed: int = 0  # of draws and random clicks
    prompts_per_batch: int = 64
    device: str = "auto"

    metrics: ClassVar[Mapping[str, Metric]] = {
        "miou": Metric("mIoU", across="clicks", percent=True, better="higher", end=1.0, help=MIOU),
        "miou_per_image": Metric(
            "mIoU per image", across="clicks", percent=True, better="higher", end=1.0, help=PER_IMAGE_HELP
        ),
        "skipped": Metric("skipped", across="reason", better="lower", help=SKIPPED),
    }
    dimensions: ClassVar[Mapping[str, str]] = {"size": SIZE}
    splits: ClassVar[tuple[str, ...]] = ("train", "validation")  # a source without validation images is taken whole
    own_decoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise a UserError for settings that measure nothing or contradict each other."""
        least = 0 if self.prompt == "box" else 1
        if not self.clicks or min(self.clicks) < least:
            raise UserError(f"clicks={list(self.clicks)}: prompt={self.prompt} needs numbers from {least} on")
        for name in ("limit", "per_image", "prompts_per_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value}: needs at least 1")
        if self.prompt == "click" and self.boxes is not None:
            raise UserError(f"boxes={self.boxes}: would be ignored by prompt=click; set prompt=box")
        if self.against == "teacher" and self.resolution == "low":
            raise UserError("against=teacher: compares at the original resolution; set resolution=original")
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: expected 0 or more")
        datasets.check_name(self.dataset)
        if self.images is not None:
            image_sources.check(self.images)
        truth.build(self.truth, self.annotations)

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a recipe whose run makes no masks."""
        segmenters.check("prompted_miou", recipe, self.teacher)

    def check_images(self, recipe: Recipe) -> None:
        """Raise a UserError if the annotations' file or folder, or that of the boxes, is missing."""
        truth.build(self.truth, self.annotations).check()
        if self.boxes is not None:
            read_boxes(self.boxes)

    @property
    def answering(self) -> Answering:
        """The settings that say how a prompt is answered and continued."""
        return Answering(self.clicks, self.next_click, self.mask_input, self.select, self.resolution, self.seed)

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module], partial: Partial | None = None) -> Judged:
        """Score the students by name, and their teacher if it is at hand, on all annotated images.

        Images whose results `partial` already has are skipped.
        """
        self.check_images(recipe)
        opened = Segmenters.open(recipe, students, self.images, self.teacher, self.device)
        if self.against == "teacher" and TEACHER not in opened.subjects:
            raise UserError("against=teacher: the teacher is not at hand; use its cache's images, or set teacher=true")
        joined = truth.build(self.truth, self.annotations).join(opened.names)
        datasets.check_whole(self.dataset, joined)
        names = list(joined.images)[: self.limit]
        judged = {} if partial is None else {name: partial.done[name] for name in names if name in partial.done}
        boxes = None if self.boxes is None else read_boxes(self.boxes)
        remaining = [name for name in names if name not in judged]
        done = sum(result["prompts"] for result in judged.values())
        with progress(None, f"prompted_miou, {len(names)} images", None, initial=done, unit="prompt") as bar:
            for image in stop.between(opened.images(remaining)):
                judged[image.name] = _judge(self, image, joined, boxes, bar.update)
                if partial is not None:
                    partial.add(image.name, judged[image.name])
                prompts = sum(result["prompts"] for result in judged.values())
                bar.total = round(prompts / len(judged) * len(names))  # prompts differ between images: an estimate
        return _summary(judged, joined, list(opened.subjects))


def read_boxes(path: str) -> dict[int, Box]:
    """Return a detector's boxes (x, y, width, height) by the id of their annotation. Raises UserError if it is none."""
    try:
        boxes = {int(entry["id"]): tuple(map(float, entry["bbox"])) for entry in json.loads(Path(path).read_bytes())}
    except (*MALFORMED, OSError) as error:
        raise UserError(f"boxes={path}: not a JSON list of {{id, bbox}}: {problem(error)}") from None
    for number, box in boxes.items():
        if len(box) != 4 or not np.isfinite(box).all():
            raise UserError(f"boxes={path}: the box of annotation {number} is {list(box)}, expected 4 finite numbers")
    return boxes  # type: ignore[return-value]


def _judge(
    protocol: PromptedMiou,
    image: SegmentedImage,
    joined: JoinedTruth,
    boxes: Mapping[int, Box] | None,
    advance: Advance,
) -> dict[str, Any]:
    """Score one image; return each subject's IoU by number of clicks, the areas and what was skipped, for JSON."""
    annotated, prompts = joined.of(image), 0
    skipped = list(annotated.skipped)
    chosen = _drawn(protocol, _kept(protocol, annotated.instances, boxes, image.name, skipped), image.name)
    scores: dict[str, dict[str, list]] = {name: {str(c): [] for c in protocol.clicks} for name in image.segmenters}
    areas: list[float] = []
    step = max(1, min(protocol.prompts_per_batch, PIXELS // (image.original[0] * image.original[1])))
    for start in range(0, len(chosen), step):
        numbered = list(enumerate(chosen))[start : start + step]
        targets = list(_targets(protocol, image, numbered, skipped))
        if not targets:
            continue
        if protocol.against == "teacher":
            targets = _by_teacher(protocol, image, targets)
        areas += [target.area for target in targets]
        for name, segmenter in image.segmenters.items():
            counted: list[int] = []
            by_clicks = prompt_rounds.scores(protocol.answering, segmenter, targets, image.name, counted.append)
            for clicks, iou_P in by_clicks.items():
                scores[name][str(clicks)] += iou_P.tolist()
            prompts += sum(counted)
            advance(sum(counted))
    result = {"group": image.group, "areas": areas, "iou": scores, "prompts": prompts}
    return {**result, "skipped": [list(skip) for skip in skipped]}


def _kept(
    protocol: PromptedMiou,
    instances: Sequence[Instance],
    boxes: Mapping[int, Box] | None,
    name: str,
    skipped: list[Skip],
) -> Iterator[Instance]:
    """Yield the instances that the rules keep, with a detector's box if there are any."""
    for instance in instances:
        place = f"{name}, annotation {instance.id}"
        if instance.crowd and protocol.crowd == "drop":
            skipped.append(Skip("crowd", place))
        elif instance.area < protocol.min_area:
            skipped.append(Skip("tiny", f"{place}: its area is {instance.area:g}"))
        elif boxes is None:
            yield instance
        elif instance.id in boxes:
            yield replace(instance, box=boxes[instance.id])
        else:
            skipped.append(Skip("no box", place))


def _drawn(protocol: PromptedMiou, instances: Iterator[Instance], name: str) -> list[Instance]:
    """Return at most `per_image` of an image's instances; draws depend on the seed and the image's name."""
    kept, most = list(instances), protocol.per_image
    if most is None or len(kept) <= most:
        return kept
    if protocol.draw == "first":
        return kept[:most]
    rng = np.random.default_rng([protocol.seed, zlib.crc32(name.encode())])
    return [kept[number] for number in rng.integers(len(kept), size=most)]


def _targets(
    protocol: PromptedMiou, image: SegmentedImage, numbered: Sequence[tuple[int, Instance]], skipped: list[Skip]
) -> Iterator[Target]:
    """Yield the instances with their mask and first prompt; those without are skipped."""
    resized = next(iter(image.segmenters.values())).resized
    for number, instance in numbered:
        place = f"{image.name}, annotation {instance.id}"
        try:
            mask_HW = truth_HW = instance.mask(image.original)
        except MALFORMED as error:
            skipped.append(Skip("mask malformed", f"{place}: {problem(error)}"))
            continue
        scale = (1.0, 1.0)
        if protocol.widen_truth:
            mask_HW, scale = (
                nearest(truth_HW, resized),
                (image.original[1] / resized[1], image.original[0] / resized[0]),
            )
            truth_HW = widened(mask_HW, image.original)
        if not mask_HW.any():
            skipped.append(Skip("mask empty", place))
            continue
        try:
            x, y, width, height = instance.box
            if protocol.prompt == "box":
                yield Target(number, instance.area, truth_HW, box=(x, y, x + width, y + height))
            else:
                first = first_click(protocol.first_click, instance, mask_HW, scale)
                yield Target(number, instance.area, truth_HW, first=first)
        except ValueError as error:
            skipped.append(Skip("no point", f"{place}: {problem(error)}"))


def _by_teacher(protocol: PromptedMiou, image: SegmentedImage, targets: Sequence[Target]) -> list[Target]:
    """Return the targets with the teacher's masks for their first prompts; for `oracle` its best-predicted ones."""
    segmenter, select = image.segmenters[TEACHER], protocol.select
    select = "best_predicted" if select == "oracle" else select
    points = labels = boxes = None
    if protocol.prompt == "box":
        boxes = np.array([target.box for target in targets])
    else:
        points = np.array([[target.first[:2]] for target in targets if target.first is not None])
        labels = np.ones(points.shape[:2])
    decoded = segmenter.decode(points, labels, boxes, multimask=select != "single")
    logits_Pnn = choose(*decoded, select)[:, 0]
    pieces = binary(segmenter.head, logits_Pnn, image.original, segmenter.resized, "original")
    masks = [mask.cpu().numpy() for piece in pieces for mask in piece]
    return [replace(target, truth=mask_HW) for target, mask_HW in zip(targets, masks, strict=True)]


def _summary(judged: Mapping[str, dict[str, Any]], joined: JoinedTruth, subjects: Sequence[str]) -> Judged:
    """Return the rows of all images, and details: the sums of each image, and the first skipped places."""
    skipped = [*joined.skipped, *(Skip(*skip) for result in judged.values() for skip in result["skipped"])]
    counts = Counter(skip.reason for skip in skipped)
    if not any(result["areas"] for result in judged.values()):
        first = f"; skipped {len(skipped)}, first: {skipped[0].reason}, {skipped[0].place}" if skipped else ""
        raise UserError(f"prompted_miou: no objects to judge on {len(judged)} annotated images{first}")
    if skipped:
        log.warning("prompted_miou: skipped %s", ", ".join(f"{n} ({reason})" for reason, n in counts.items()))
    means = Means()
    groups = sorted({result["group"] for result in judged.values()})
    parts: list[dict[str, str]] = [{}, *({"size": size} for size in SIZES)]
    parts += [{"group": group} for group in groups if len(groups) > 1]
    for part in parts:
        for subject in subjects:
            for name, result in judged.items():
                _add(means, name, subject, result, part)
    rows: list[Row] = means.rows()
    rows += [results.row(subject, "skipped", n, reason=reason) for subject in subjects for reason, n in counts.items()]
    return rows, {**means.details(), "skipped": [f"{skip.reason}: {skip.place}" for skip in skipped[:SHOWN]]}


def _add(means: Means, image: str, subject: str, result: Mapping[str, Any], part: Mapping[str, str]) -> None:
    """Add one image's scores of a subject: all, or those of a size or a group."""
    if part.get("group", result["group"]) != result["group"]:
        return
    low, high = SIZES.get(part.get("size", ""), (0.0, float("inf")))
    area_P = np.array(result["areas"])
    members_P = (area_P >= low) & (area_P <= high)
    for clicks, values in result["iou"][subject].items():
        number = None if list(result["iou"][subject]) == ["0"] else int(clicks)  # a box alone has no clicks
        iou_P = np.array(values)[members_P]
        means.add(image, subject, "miou", iou_P, clicks=number, **part)
        if "size" not in part and len(iou_P):
            means.add(image, subject, "miou_per_image", [iou_P.mean()], clicks=number, **part)
