"""Score students against their teacher: the masks that both give for a grid of points, through the teacher's decoder.

Letters: P points, M masks of a prompt (1 or 3), C channels, g tokens a side, H x W original pixels,
h x w resized pixels (before padding to SAM's square input).
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fmdistill import stop
from fmdistill.backbones.device import pick_device
from fmdistill.backbones.fast_decoder import Decode, image_decoder
from fmdistill.backbones.promptable import PromptHead
from fmdistill.evaluate import tails
from fmdistill.evaluate.kept import Partial
from fmdistill.evaluate.masks import Bits, iou, join, pack, to_rle
from fmdistill.registry import UserError

Select = Literal["single", "best_predicted", "paired", "oracle"]
Resolution = Literal["original", "low"]
Size = tuple[int, int]
Advance = Callable[[int], object]


@dataclass(frozen=True)
class GridMiou:
    """How to judge: k x k points at (i + 1/2)/k of width and height, mask logits > 0, empty against empty = 1.

    `select` says which of SAM's masks is compared: `single` = mask 0 of both; `best_predicted` = each side's own top
    predicted IoU among masks 1 to 3; `paired` = the mean over masks 1 to 3 by index; `oracle` = the student's best
    mask against the teacher's predicted-best. `resolution` is the original image's, or `low`: the 4g x 4g logits
    without those that lie in the padding. `floors` asks the caller for the rows of an untrained student, the constant
    mean embedding and another image's embedding. `write_masks` keeps the first grid's masks as COCO RLE. `by_size` and
    `by_edge` add the mIoU by the area of the teacher's mask and by the point's distance to its edge (tails.py).
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

    def __post_init__(self) -> None:
        """Refuse what would measure nothing."""
        if not self.grids or min(self.grids) < 1:
            raise UserError(f"grids={list(self.grids)}: needs at least one grid of 1 or more points a side")
        if self.points_per_batch < 1:
            raise UserError(f"points_per_batch={self.points_per_batch}: needs at least 1")
        if self.images is not None and self.images < 1:
            raise UserError(f"images={self.images}: needs at least 1, or null for all")
        if self.select == "paired" and (self.by_size or self.by_edge):
            raise UserError("select=paired: by_size and by_edge need one teacher's mask per point; try select=single")


@dataclass(frozen=True)
class Case:
    """One image: the teacher's exact full embedding and the students' by name, float32 (C, g, g); sizes as (H, W)."""

    key: str
    group: str
    teacher: Tensor
    students: Mapping[str, Tensor]
    original: Size
    resized: Size
    shard: str = ""

    @property
    def image(self) -> str:
        """What tells the image from those of other shards, whose keys may be the same."""
        return f"{self.shard}/{self.key}"


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
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return, per point, each student's IoU, float64 (grid * grid,), and whether each bucket holds it, bool.

    `advance` is told the number of prompts as they are done.
    """
    scores: dict[str, list[np.ndarray]] = {name: [] for name in students}
    buckets: dict[str, list[np.ndarray]] = defaultdict(list)
    pixels = _pixels(head, grid, original, resized, protocol)
    with torch.inference_mode():
        ask_teacher = image_decoder(head, teacher)
        ask = {name: image_decoder(head, embedding) for name, embedding in students.items()}
        prompts = _prompts(head, grid, original, resized, protocol.points_per_batch)
        for points, xy in stop.between(zip(prompts, pixels, strict=True)):
            masks = masks_at(teacher_side(protocol), head, ask_teacher, points, original, resized)
            wanted = _bits(tails.watched(masks, xy, protocol.by_size, protocol.by_edge, buckets))
            for name, decode in ask.items():
                given = _bits(masks_at(protocol, head, decode, points, original, resized))
                scores[name].append(_score(wanted, given, len(points)))
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
    """Return one student's IoU per point, float64 (grid * grid,)."""
    return compare(head, teacher, {"student": student}, original, resized, grid, protocol)[0]["student"]


def teacher_side(protocol: GridMiou) -> GridMiou:
    """Return the protocol by which the teacher's mask is chosen."""
    return replace(protocol, select="best_predicted") if protocol.select == "oracle" else protocol


@torch.inference_mode()
def masks_at(
    protocol: GridMiou, head: PromptHead, decode: Decode, points: Tensor, original: Size, resized: Size
) -> Iterator[Tensor]:
    """Yield the chosen masks of `points` (P, 2), resized xy, as bool (n, H, W) pieces, prompt by prompt.

    `decode` is `image_decoder(head, embedding)`.
    """
    labels = torch.ones(len(points), 1, dtype=torch.int, device=points.device)
    decoded = decode(points[:, None], labels, multimask=protocol.select != "single")
    logits_Xhw = choose(*decoded, protocol.select).flatten(0, 1)
    if protocol.resolution == "low":
        # A row counts if it holds any real pixel, as tokens do.
        scale = logits_Xhw.shape[-1] / head.config["image_size"]
        rows, columns = (math.ceil(n * scale) for n in resized)
        yield (logits_Xhw[:, :rows, :columns] > 0).contiguous()
        return
    # Small pieces stay in a CPU's cache.
    pixels = 2**28 if logits_Xhw.is_cuda else 2**20
    step = max(1, pixels // max(original[0] * original[1], head.config["image_size"] ** 2))
    for piece in logits_Xhw.unsqueeze(1).split(step):
        yield (head.upsample(piece, resized, original) > 0).squeeze(1)


def choose(logits_PMhw: Tensor, predicted_PM: Tensor, select: Select) -> Tensor:
    """Keep the mask with the top predicted IoU where the mode wants one of several; before any upsampling."""
    if select != "best_predicted":
        return logits_PMhw
    best_P = predicted_PM.argmax(1)
    return logits_PMhw[torch.arange(len(best_P), device=best_P.device), best_P].unsqueeze(1)


def run(
    protocol: GridMiou,
    head: PromptHead,
    cases: Iterable[Case],
    partial: Partial | None = None,
    advance: Advance = lambda prompts: None,
) -> tuple[dict[str, float], dict]:
    """Return metrics {"STUDENT/16x16/miou": ..., "STUDENT/16x16/GROUP/miou": ..., "STUDENT/feature/cosine": ...}
    and details {"rows": one per image and student, "masks": RLE of the first grid if the protocol writes them}.

    `miou` is the mean over all points of all images, `miou_per_image` the mean of the images' means. A bucket that
    holds any point adds "STUDENT/16x16/BUCKET/miou", the mean over its points of all images, and ".../points", their
    number. The feature figures are means over an image's valid tokens, then over images. `partial` stores the result
    of each image; `cases` are then those that it lacks.
    """
    device = pick_device(protocol.device, "device")
    head = head.to(device).eval()
    results = list(partial.done.values()) if partial is not None else []
    left = None if protocol.images is None else max(0, protocol.images - len(results))
    for case in stop.between(itertools.islice(cases, left)):
        result = _judge(protocol, head, case, device, advance)
        if partial is not None:
            partial.add(case.image, result)
        results.append(result)
    if not results:
        raise UserError("grid_miou: no images to evaluate; the cache's validation split is empty or images=0")
    rows = [row for result in results for row in result["rows"]]
    masks = [entry for result in results for entry in result["masks"]]
    points: dict[str, list[np.ndarray]] = defaultdict(list)
    tail: dict[str, list[np.ndarray]] = defaultdict(list)
    for result in results:
        for grid, scores in result["iou"].items():
            for name, values in scores.items():
                iou_P = np.array(values)
                points[f"{name}/{grid}"].append(iou_P)
                points[f"{name}/{grid}/{result['group']}"].append(iou_P)
                for bucket, members in result["buckets"][grid].items():
                    tail[f"{name}/{grid}/{bucket}"].append(iou_P[np.array(members, dtype=bool)])
    return _metrics(rows, points, tail), {"rows": rows, "masks": masks} if protocol.write_masks else {"rows": rows}


def _judge(protocol: GridMiou, head: PromptHead, case: Case, device: torch.device, advance: Advance) -> dict[str, Any]:
    """Return one image's result, ready for JSON: its rows, each point's IoU by grid and student, and its buckets."""
    teacher = case.teacher.to(device)
    students = {name: embedding.to(device) for name, embedding in case.students.items()}
    row: dict[str, dict] = {name: {"key": case.key, "group": case.group, "student": name} for name in students}
    result: dict[str, Any] = {"group": case.group, "iou": {}, "buckets": {}, "masks": []}
    for name, embedding in students.items():
        row[name].update(_features(head, teacher, embedding, case.resized))
    for k in protocol.grids:
        scores, buckets = compare(head, teacher, students, case.original, case.resized, k, protocol, advance)
        for name, values in scores.items():
            row[name][f"{k}x{k}/miou"] = float(values.mean())
        result["iou"][f"{k}x{k}"] = {name: values.tolist() for name, values in scores.items()}
        result["buckets"][f"{k}x{k}"] = {name: members.tolist() for name, members in buckets.items()}
    if protocol.write_masks:
        result["masks"] = _rles(protocol, head, case, {"teacher": teacher, **students})
    return {"rows": list(row.values()), **result}


def _metrics(rows: list[dict], points: Mapping[str, list], tail: Mapping[str, list]) -> dict[str, float]:
    metrics = {}
    for name, parts in points.items():
        metrics[f"{name}/miou"] = float(np.concatenate(parts).mean())
        metrics[f"{name}/miou_per_image"] = float(np.mean([part.mean() for part in parts]))
    metrics |= tails.metrics(_joined(tail))
    for name in dict.fromkeys(row["student"] for row in rows):
        for key in ("feature/cosine", "feature/mse"):
            metrics[f"{name}/{key}"] = float(np.mean([row[key] for row in rows if row["student"] == name]))
    return metrics


def _features(head: PromptHead, teacher: Tensor, student: Tensor, resized: Size) -> dict[str, float]:
    stride = head.config["image_size"] / teacher.shape[-1]
    rows, columns = (math.ceil(n / stride) for n in resized)
    t, s = teacher[:, :rows, :columns].float(), student[:, :rows, :columns].float()
    cosine = torch.nn.functional.cosine_similarity(t, s, dim=0).mean()
    return {"feature/cosine": float(cosine), "feature/mse": float((t - s).square().mean())}


@torch.inference_mode()
def _rles(protocol: GridMiou, head: PromptHead, case: Case, embeddings: Mapping[str, Tensor]) -> list[dict]:
    k = protocol.grids[0]
    shown = grid_points(k, case.original)
    written: list[dict] = [{"key": case.key, "grid": k, "point": [float(v) for v in xy]} for xy in shown]
    for name, embedding in embeddings.items():
        side = teacher_side(protocol) if name == "teacher" else protocol
        decode, found = image_decoder(head, embedding), []
        for points in _prompts(head, k, case.original, case.resized, protocol.points_per_batch):
            pieces = masks_at(side, head, decode, points, case.original, case.resized)
            found += [to_rle(mask) for piece in pieces for mask in piece.cpu().numpy()]
        each = len(found) // len(written)
        for i, entry in enumerate(written):
            entry[name] = found[i * each : (i + 1) * each]
    return written


def _prompts(head: PromptHead, k: int, original: Size, resized: Size, batch: int) -> tuple[Tensor, ...]:
    scale = np.array([resized[1] / original[1], resized[0] / original[0]])
    points = torch.from_numpy((grid_points(k, original) * scale).astype(np.float32))
    return points.to(next(head.parameters()).device).split(batch)


def _pixels(head: PromptHead, k: int, original: Size, resized: Size, protocol: GridMiou) -> tuple[Tensor, ...]:
    """Return the pixels of the compared masks that hold the points, int (P, 2) xy, in the batches of `_prompts`."""
    cells = 4 * head.config["image_embedding_size"] / head.config["image_size"]
    height, width = original if protocol.resolution == "original" else (n * cells for n in resized)
    xy = (grid_points(k, (1, 1)) * [width, height]).astype(np.int64)
    return torch.from_numpy(xy).split(protocol.points_per_batch)


def _joined(parts: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate(several) for name, several in parts.items()}


def _bits(pieces: Iterable[Tensor]) -> Bits:
    return join([pack(piece) for piece in pieces])


def _score(wanted: Bits, given: Bits, prompts: int) -> np.ndarray:
    """IoU per prompt: the mean over paired masks, or the student's best where only the student has several."""
    several = len(given) // len(wanted)
    if several == 1:
        return iou(wanted, given).reshape(prompts, -1).mean(1)
    repeated = wanted.repeat_interleave(several, 0) if isinstance(wanted, Tensor) else wanted.repeat(several, 0)
    return iou(repeated, given).reshape(prompts, -1).max(1)
