"""Score students by their masks for a grid of points, against the teacher's masks for the same points.

Letters: P points, M masks of a prompt (1 or 3), C channels, g tokens a side, H x W original pixels,
h x w resized pixels (before padding to SAM's square input).
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fmdistill import stop, teachers
from fmdistill.backbones.device import pick_device
from fmdistill.backbones.fast_decoder import Decode, image_decoder
from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache import open_cache
from fmdistill.evaluate import grid_cases, results, tails
from fmdistill.evaluate.grid_cases import Case, Size
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.mask_choice import Resolution, binary, choose
from fmdistill.evaluate.masks import Bits, iou, join, pack, to_rle
from fmdistill.evaluate.results import Judged, Metric, Row
from fmdistill.evaluate.segmenters import head_of
from fmdistill.evaluate.stored_results import Partial
from fmdistill.logs import log, progress
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

Select = Literal["single", "best_predicted", "paired", "oracle"]
Advance = Callable[[int], object]
NONE: Mapping[str, PromptHead] = MappingProxyType({})

MIOU = (
    "mIoU × 100 of the masks that the student's and the teacher's embeddings give for the same k×k grid of points, "
    "both through the teacher's prompt decoder, or the student's through its own if it has one; the teacher against "
    "itself scores 100."
)
FEATURES = "Feature figures compare the embeddings themselves over the tokens that hold any real pixel."


@dataclass(frozen=True)
class GridMiou:
    """Mean IoU of the student's and the teacher's masks, logits > 0, at k x k points for each k of `grids`.

    Points lie at (i + 1/2)/k of width and height; two empty masks have IoU 1. `select` chooses the masks to compare:
    `single` = mask 0 of both; `best_predicted` = the mask of each with its highest predicted IoU, of masks 1 to 3;
    `paired` = the mean over masks 1 to 3 by index; `oracle` = the student's best mask against the teacher's
    best-predicted one. `resolution` is the original image's, or `low`: the 4g x 4g logits without the padding.
    `floors` adds an untrained student, the constant mean embedding and another image's embedding. `write_masks` stores
    the first grid's masks as COCO RLE. `by_size` and `by_edge` add the mIoU by the area of the teacher's mask and by
    the point's distance to its edge (tails.py).
    """

    grids: tuple[int, ...] = (5, 16, 32)
    select: Select = "best_predicted"
    resolution: Resolution = "original"
    points_per_batch: int = 64
    images: int | None = None
    floors: bool = False
    write_masks: bool = False
    by_size: bool = False
    by_edge: bool = False
    device: str = "auto"

    metrics: ClassVar[Mapping[str, Metric]] = {
        "miou": Metric("mIoU", across="grid", percent=True, better="higher", end=1.0, help=MIOU),
        "miou_per_image": Metric("mIoU per image", across="grid", percent=True, better="higher", end=1.0, shown=False),
        "cosine": Metric("feature", "cosine", better="higher", help=FEATURES),
        "mse": Metric("feature", "mse", better="lower", help=FEATURES),
    }

    own_decoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise a UserError for settings that measure nothing."""
        if not self.grids or min(self.grids) < 1:
            raise UserError(f"grids={list(self.grids)}: needs at least one grid of 1 or more points a side")
        if self.points_per_batch < 1:
            raise UserError(f"points_per_batch={self.points_per_batch}: needs at least 1")
        if self.images is not None and self.images < 1:
            raise UserError(f"images={self.images}: needs at least 1, or null for all")
        if self.select == "paired" and (self.by_size or self.by_edge):
            raise UserError("select=paired: by_size and by_edge need one teacher's mask per point; try select=single")

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a teacher other than SAM, and for floors from a trimmed cache.

        A trimmed cache lacks the padded tokens that the mean embedding needs.
        """
        if recipe.cache is None or not teachers.may_belong_to(recipe.teacher, "sam"):
            raise UserError(
                f"grid_miou: needs a run distilled from a cached SAM; this recipe's teacher is "
                f"{(recipe.teacher or {}).get('name', 'none')}{', not cached' if recipe.cache is None else ''}"
            )
        if self.floors and recipe.cache.trim:
            raise UserError(
                "floors=true: the mean embedding needs the padded tokens of the training images, which a cache with "
                "cache.trim=true does not store; set cache.trim=false, or use a protocol with floors=false, such as "
                "protocols=[eval/sam_grid_tail.yaml]"
            )

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module], partial: Partial | None = None) -> Judged:
        """Score the students by name against their teacher, on the validation images of the recipe's cache.

        Images whose results `partial` already has are skipped.
        """
        cache = open_cache(recipe)
        if cache.family != "sam":
            raise UserError(
                f"{cache.root}: its teacher is of the family '{cache.family}' and makes no masks; grid_miou needs a "
                f"run distilled from SAM"
            )
        device = pick_device(self.device, "device")
        students = {name: student.to(device) for name, student in students.items()}
        head = cache.head()
        own = {name: trained for name, student in students.items() if (trained := head_of(student, recipe)) is not None}
        for name, trained in own.items():
            _check_sizes(name, trained, head)
        total = sum(len(shard.samples) for shard in cache.shards["validation"])
        done = partial.done if partial is not None else {}
        prompts, images = sum(k * k for k in self.grids), min(total, self.images or total)
        if done:
            log.info("grid_miou: %d of %d images were judged before the last stop", len(done), images)
        title, judged = f"grid_miou, {images} images", len(done) * prompts
        with progress(None, title, images * prompts, initial=judged, unit="prompt") as bar:
            cases = grid_cases.cases(cache, recipe, students, self.floors, device, done)
            return run(self, head, cases, partial, bar.update, own)


def _check_sizes(name: str, own: PromptHead, teacher: PromptHead) -> None:
    """Raise a UserError unless a student's own head takes images and embeddings of the teacher's sizes."""
    for setting in ("image_size", "image_embedding_size", "embed_dim"):
        if own.config[setting] != teacher.config[setting]:
            raise UserError(
                f"grid_miou: {name} has a mask decoder of {setting}={own.config[setting]}, its teacher's has "
                f"{teacher.config[setting]}; judge it by the cache that it learned from, or by prompted_miou"
            )


def grid_points(k: int, original: Size) -> np.ndarray:
    """Return the k x k points, row by row, as float64 (k*k, 2) xy in original pixels."""
    centres = (np.arange(k) + 0.5) / k
    y, x = np.meshgrid(centres * original[0], centres * original[1], indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1)


def compare(
    head: PromptHead,
    teacher: Tensor,
    students: Mapping[str, Tensor],
    original: Size,
    resized: Size,
    grid: int,
    protocol: GridMiou = GridMiou(),
    advance: Advance = lambda prompts: None,
    own: Mapping[str, PromptHead] = NONE,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return each student's IoU at every point, float64 (grid * grid,), and each bucket's members, bool (grid * grid,).

    `head` is the teacher's, and `own` holds those of students that have one, of the same sizes. `advance` is called
    with the number of prompts of each finished batch.
    """
    scores: dict[str, list[np.ndarray]] = {name: [] for name in students}
    buckets: dict[str, list[np.ndarray]] = defaultdict(list)
    pixels = _pixels(head, grid, original, resized, protocol)
    with torch.inference_mode():
        decode_teacher = image_decoder(head, teacher)
        decoders = {name: image_decoder(own.get(name, head), embedding) for name, embedding in students.items()}
        prompts = _prompts(head, grid, original, resized, protocol.points_per_batch)
        for points, xy in stop.between(zip(prompts, pixels, strict=True)):
            masks = masks_at(teacher_protocol(protocol), head, decode_teacher, points, original, resized)
            teacher_masks = _bits(tails.record_buckets(masks, xy, protocol.by_size, protocol.by_edge, buckets))
            for name, decode in decoders.items():
                student_masks = _bits(masks_at(protocol, head, decode, points, original, resized))
                scores[name].append(_score(teacher_masks, student_masks, len(points)))
            advance(len(points))
    return _joined(scores), _joined(buckets)


def image_iou(
    head: PromptHead,
    teacher: Tensor,
    student: Tensor,
    original: Size,
    resized: Size,
    grid: int,
    protocol: GridMiou = GridMiou(),
) -> np.ndarray:
    """Return one student's IoU at every point, float64 (grid * grid,)."""
    return compare(head, teacher, {"student": student}, original, resized, grid, protocol)[0]["student"]


def teacher_protocol(protocol: GridMiou) -> GridMiou:
    """Return the protocol that selects the teacher's mask; in `oracle` mode it is the best-predicted mask."""
    return replace(protocol, select="best_predicted") if protocol.select == "oracle" else protocol


@torch.inference_mode()
def masks_at(
    protocol: GridMiou, head: PromptHead, decode: Decode, points: Tensor, original: Size, resized: Size
) -> Iterator[Tensor]:
    """Decode the selected masks of `points` (P, 2), resized xy; yield them as bool (n, H, W) pieces, prompt by prompt.

    `decode` is `image_decoder(head, embedding)`.
    """
    labels = torch.ones(len(points), 1, dtype=torch.int, device=points.device)
    decoded = decode(points[:, None], labels, multimask=protocol.select != "single")
    logits_Xhw = choose(*decoded, protocol.select).flatten(0, 1)
    yield from binary(head, logits_Xhw, original, resized, protocol.resolution)


def run(
    protocol: GridMiou,
    head: PromptHead,
    cases: Iterable[Case],
    partial: Partial | None = None,
    advance: Advance = lambda prompts: None,
    own: Mapping[str, PromptHead] = NONE,
) -> Judged:
    """Score the cases; return rows, and details {"images": one per image and subject, "masks": the first grid's RLE}.

    `miou` is the mean over all points of all images and of each group, `miou_per_image` the mean of the images' means,
    with a row for every grid. Every bucket with points adds the mean over its points of all images. The feature
    figures `cosine` and `mse` are means over an image's valid tokens, then over images. `partial` stores the result of
    each image; `cases` must then be the images that it lacks. `own` holds the heads of students that have one.
    """
    device = pick_device(protocol.device, "device")
    head = head.to(device).eval()
    own = {name: student_head.to(device).eval() for name, student_head in own.items()}
    judged = dict(partial.done) if partial is not None else {}
    remaining = None if protocol.images is None else max(0, protocol.images - len(judged))
    for case in stop.between(itertools.islice(cases, remaining)):
        result = _judge(protocol, head, case, device, advance, own)
        if partial is not None:
            partial.add(case.image, result)
        judged[case.image] = result
    if not judged:
        raise UserError("grid_miou: no images to evaluate; the cache's validation split is empty, or images=0")
    images = [image for result in judged.values() for image in result["images"]]
    masks = {"masks": [entry for result in judged.values() for entry in result["masks"]]}
    means = _means(judged)
    rows = means.with_intervals([*_miou_rows(list(judged.values())), *_feature_rows(images)])
    return rows, {"images": images, **means.details(), **(masks if protocol.write_masks else {})}


def _judge(
    protocol: GridMiou,
    head: PromptHead,
    case: Case,
    device: torch.device,
    advance: Advance,
    own: Mapping[str, PromptHead],
) -> dict[str, Any]:
    """Score one image; return its means, each point's IoU and each bucket's members by grid, ready for JSON."""
    teacher = case.teacher.to(device)
    students = {name: embedding.to(device) for name, embedding in case.students.items()}
    image: dict[str, dict] = {name: {"key": case.key, "group": case.group, "subject": name} for name in students}
    result: dict[str, Any] = {"group": case.group, "iou": {}, "buckets": {}, "masks": []}
    for name, embedding in students.items():
        image[name].update(_features(head, teacher, embedding, case.resized), miou={})
    for k in protocol.grids:
        scores, buckets = compare(head, teacher, students, case.original, case.resized, k, protocol, advance, own)
        for name, values in scores.items():
            image[name]["miou"][f"{k}x{k}"] = float(values.mean())
        result["iou"][f"{k}x{k}"] = {name: values.tolist() for name, values in scores.items()}
        result["buckets"][f"{k}x{k}"] = {name: members.tolist() for name, members in buckets.items()}
    if protocol.write_masks:
        result["masks"] = _rles(protocol, head, case, {"teacher": teacher, **students}, own)
    return {"images": list(image.values()), **result}


def _means(judged: Mapping[str, dict[str, Any]]) -> Means:
    """Return the means of the rows below, by image, for their intervals."""
    means = Means()
    for image, result in judged.items():
        for grid, scores in result["iou"].items():
            for name, values in scores.items():
                iou_P = np.array(values)
                for group in (None, result["group"]):
                    means.add(image, name, "miou", iou_P, grid=grid, group=group)
                    means.add(image, name, "miou_per_image", [iou_P.mean()], grid=grid, group=group)
                for bucket, members in result["buckets"][grid].items():
                    means.add(image, name, "miou", iou_P[np.array(members, dtype=bool)], grid=grid, bucket=bucket)
        for entry in result["images"]:
            for metric in ("cosine", "mse"):
                means.add(image, entry["subject"], metric, [entry[metric]])
    return means


def _miou_rows(judged: list[dict[str, Any]]) -> list[Row]:
    """Return rows for each subject and grid: over all images, by group, and by bucket."""
    points: dict[tuple[str, str, str | None], list[np.ndarray]] = defaultdict(list)
    tail: dict[tuple[str, str, str], list[np.ndarray]] = defaultdict(list)
    for result in judged:
        for grid, scores in result["iou"].items():
            for name, values in scores.items():
                iou_P = np.array(values)
                points[name, grid, None].append(iou_P)
                points[name, grid, result["group"]].append(iou_P)
                for bucket, members in result["buckets"][grid].items():
                    tail[name, grid, bucket].append(iou_P[np.array(members, dtype=bool)])
    rows: list[Row] = []
    for (name, grid, group), parts in points.items():
        iou_P, dimensions = np.concatenate(parts), {"grid": grid, "group": group}
        rows.append(results.row(name, "miou", iou_P.mean(), len(iou_P), **dimensions))
        means = [part.mean() for part in parts]
        rows.append(results.row(name, "miou_per_image", np.mean(means), len(means), **dimensions))
    for (name, grid, bucket), parts in tail.items():
        iou_P = np.concatenate(parts)
        if len(iou_P):
            rows.append(results.row(name, "miou", iou_P.mean(), len(iou_P), grid=grid, bucket=bucket))
    return rows


def _feature_rows(images: list[dict]) -> list[Row]:
    subjects = dict.fromkeys(image["subject"] for image in images)
    by_subject = {name: [image for image in images if image["subject"] == name] for name in subjects}
    return [
        results.row(name, metric, np.mean([image[metric] for image in members]), len(members))
        for name, members in by_subject.items()
        for metric in ("cosine", "mse")
    ]


def _features(head: PromptHead, teacher: Tensor, student: Tensor, resized: Size) -> dict[str, float]:
    stride = head.config["image_size"] / teacher.shape[-1]
    rows, columns = (math.ceil(n / stride) for n in resized)
    t, s = teacher[:, :rows, :columns].float(), student[:, :rows, :columns].float()
    cosine = torch.nn.functional.cosine_similarity(t, s, dim=0).mean()
    return {"cosine": float(cosine), "mse": float((t - s).square().mean())}


@torch.inference_mode()
def _rles(
    protocol: GridMiou,
    head: PromptHead,
    case: Case,
    embeddings: Mapping[str, Tensor],
    own: Mapping[str, PromptHead],
) -> list[dict]:
    k = protocol.grids[0]
    xy_P2 = grid_points(k, case.original)
    entries: list[dict] = [{"key": case.key, "grid": k, "point": [float(v) for v in xy]} for xy in xy_P2]
    for name, embedding in embeddings.items():
        selection = teacher_protocol(protocol) if name == "teacher" else protocol
        decode, rles = image_decoder(own.get(name, head), embedding), []
        for points in _prompts(head, k, case.original, case.resized, protocol.points_per_batch):
            pieces = masks_at(selection, head, decode, points, case.original, case.resized)
            rles += [to_rle(mask) for piece in pieces for mask in piece.cpu().numpy()]
        per_point = len(rles) // len(entries)
        for i, entry in enumerate(entries):
            entry[name] = rles[i * per_point : (i + 1) * per_point]
    return entries


def _prompts(head: PromptHead, k: int, original: Size, resized: Size, batch: int) -> tuple[Tensor, ...]:
    scale = np.array([resized[1] / original[1], resized[0] / original[0]])
    points = torch.from_numpy((grid_points(k, original) * scale).astype(np.float32))
    return points.to(next(head.parameters()).device).split(batch)


def _pixels(head: PromptHead, k: int, original: Size, resized: Size, protocol: GridMiou) -> tuple[Tensor, ...]:
    """Return the points in pixels of the compared masks, int (P, 2) xy, in the same batches as `_prompts`."""
    cells = 4 * head.config["image_embedding_size"] / head.config["image_size"]
    height, width = original if protocol.resolution == "original" else (n * cells for n in resized)
    xy = (grid_points(k, (1, 1)) * [width, height]).astype(np.int64)
    return torch.from_numpy(xy).split(protocol.points_per_batch)


def _joined(parts: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _bits(pieces: Iterable[Tensor]) -> Bits:
    return join([pack(piece) for piece in pieces])


def _score(teacher: Bits, student: Bits, prompts: int) -> np.ndarray:
    """Return each prompt's IoU: the mean over paired masks, or the best of the student's if only it has several."""
    ratio = len(student) // len(teacher)
    if ratio == 1:
        return iou(teacher, student).reshape(prompts, -1).mean(1)
    repeated = teacher.repeat_interleave(ratio, 0) if isinstance(teacher, Tensor) else teacher.repeat(ratio, 0)
    return iou(repeated, student).reshape(prompts, -1).max(1)
