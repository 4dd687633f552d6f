"""Score a promptable model on scenes whose exact masks are known: one positive point per visible object.

Letters: P objects of one image, M masks of a prompt, C channels, g tokens a side, H x W original pixels,
h x w resized pixels (before padding to SAM's square input).
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from fmdistill import stop
from fmdistill.backbones.device import pick_device
from fmdistill.backbones.promptable import PromptHead
from fmdistill.evaluate.masks import innermost, iou, pack
from fmdistill.registry import UserError

Size = tuple[int, int]
MEASURES = ("best", "picked", "single", "ceiling")
# Largest share of the image, and the bucket's name.
BUCKETS = ((0.003, "below_0.3%"), (0.01, "0.3-1%"), (0.03, "1-3%"), (0.1, "3-10%"), (float("inf"), "above_10%"))


@dataclass(frozen=True)
class SceneMiou:
    """How to judge: one point per object, the visible pixel furthest from the object's edge; logits > 0 at H x W.

    `best` is the best of masks 1 to 3, `picked` the one with the top predicted IoU, `single` mask 0, `ceiling` the
    true mask averaged onto the 4g x 4g logits and upsampled like them: what that resolution keeps of an object.
    """

    points_per_batch: int = 64
    images: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what would measure nothing."""
        if self.points_per_batch < 1:
            raise UserError(f"points_per_batch={self.points_per_batch}: needs at least 1")
        if self.images is not None and self.images < 1:
            raise UserError(f"images={self.images}: needs at least 1, or null for all")


@dataclass(frozen=True)
class SceneCase:
    """One scene: float32 embedding (C, g, g), int labels (H, W) with object ids above 0, resized (h, w)."""

    key: str
    embedding: Tensor
    labels: np.ndarray
    resized: Size


def bucket(share: float) -> str:
    """Return the area bucket of an object that covers `share` of its image."""
    return next(name for top, name in BUCKETS if share < top)


def object_points(labels_HW: np.ndarray) -> dict[int, tuple[int, int]]:
    """Return {object id: (x, y)}: its visible pixel furthest from its edge; the image's border is an edge."""
    points = {}
    for index, box in enumerate(ndimage.find_objects(np.maximum(labels_HW, 0)), start=1):
        if box is not None:
            x, y = innermost(labels_HW[box] == index)
            points[index] = (x + box[1].start, y + box[0].start)
    return points


@torch.inference_mode()
def scene_rows(
    head: PromptHead, embedding: Tensor, labels_HW: np.ndarray, resized: Size, points_per_batch: int = 64
) -> list[dict]:
    """Return one row per object: id, point xy, its share of the image, bucket, and the IoU of each measure."""
    points = object_points(labels_HW)
    original = (labels_HW.shape[0], labels_HW.shape[1])
    rows = []
    for ids in _chunks(list(points), points_per_batch):
        xy = np.array([points[i] for i in ids]) * [resized[1] / original[1], resized[0] / original[0]]
        true_PHW = torch.from_numpy(labels_HW[None] == np.array(ids)[:, None, None])
        scores = _scores(head, embedding, torch.from_numpy(xy.astype(np.float32)), true_PHW, resized)
        shares = true_PHW.flatten(1).float().mean(1).tolist()
        for n, (i, share) in enumerate(zip(ids, shares, strict=True)):
            row = {"object": i, "point": list(points[i]), "share": share, "bucket": bucket(share)}
            rows.append(row | {name: float(values[n]) for name, values in scores.items()})
    return rows


def run(protocol: SceneMiou, head: PromptHead, cases: Iterable[SceneCase]) -> tuple[dict[str, float], dict]:
    """Return metrics {"best/miou": ..., "best/1-3%/miou": ..., "1-3%/objects": ...} over all objects of all images,
    and details {"rows": one per object}.
    """
    device = pick_device(protocol.device, "device")
    head = head.to(device).eval()
    rows = []
    for case in stop.between(itertools.islice(cases, protocol.images)):
        found = scene_rows(head, case.embedding.to(device), case.labels, case.resized, protocol.points_per_batch)
        rows += [{"key": case.key} | row for row in found]
    if not rows:
        raise UserError("scene_miou: no objects to evaluate; the source has no validation scenes")
    return summarise(rows), {"rows": rows}


def summarise(rows: list[dict]) -> dict[str, float]:
    """Return the mean of each measure over all objects and by area bucket, with the number of objects."""
    metrics: dict[str, float] = {"objects": float(len(rows))}
    metrics |= {f"{m}/miou": float(np.mean([row[m] for row in rows])) for m in MEASURES}
    for _, name in BUCKETS:
        members = [row for row in rows if row["bucket"] == name]
        metrics[f"{name}/objects"] = float(len(members))
        if members:
            metrics |= {f"{m}/{name}/miou": float(np.mean([row[m] for row in members])) for m in MEASURES}
    return metrics


def ceiling_logits(head: PromptHead, true_PHW: Tensor, resized: Size) -> Tensor:
    """Return the true masks on the logits' grid, (P, 1, 4g, 4g): the share of each cell that they cover, less half."""
    size, side = head.config["image_size"], 4 * head.config["image_embedding_size"]
    shares = F.interpolate(true_PHW[:, None].float(), resized, mode="bilinear", align_corners=False, antialias=True)
    padded = F.pad(shares, (0, size - resized[1], 0, size - resized[0]), mode="replicate")
    return F.avg_pool2d(padded, size // side) - 0.5


def _scores(head: PromptHead, embedding: Tensor, xy: Tensor, true_PHW: Tensor, resized: Size) -> dict[str, np.ndarray]:
    original = (true_PHW.shape[1], true_PHW.shape[2])
    true_PHW, xy = true_PHW.to(embedding.device), xy.to(embedding.device)
    labels = torch.ones(len(xy), 1, dtype=torch.int, device=xy.device)
    logits, predicted = head.decode(embedding, xy[:, None], labels, multimask=True)
    single, _ = head.decode(embedding, xy[:, None], labels, multimask=False)
    truth, ceiling = pack(true_PHW), ceiling_logits(head, true_PHW, resized)
    ious = []
    for mask in (*logits.split(1, dim=1), single, ceiling):  # one mask of every prompt at a time bounds the memory
        ious.append(iou(truth, pack((head.upsample(mask, resized, original) > 0).squeeze(1))))
    three = np.stack(ious[:-2], axis=1)
    picked = np.take_along_axis(three, predicted.argmax(1, keepdim=True).cpu().numpy(), axis=1)[:, 0]
    return {"best": three.max(1), "picked": picked, "single": ious[-2], "ceiling": ious[-1]}


def _chunks(ids: list[int], size: int) -> Iterable[list[int]]:
    return (ids[i : i + size] for i in range(0, len(ids), size))
