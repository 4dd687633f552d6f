"""Score a promptable model on scenes with exact masks, by one positive point per visible object.

Letters: P objects of one image, M masks of a prompt, C channels, g tokens a side, H x W original pixels,
h x w resized pixels (before padding to SAM's square input).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from fmdistill import stop
from fmdistill.backbones.device import pick_device
from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache.prepare import must_prepare
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.masks import innermost, iou, pack
from fmdistill.evaluate.results import STUDENT, Judged, Metric
from fmdistill.evaluate.subjects import embed
from fmdistill.evaluate.tails import SHARES
from fmdistill.images import Images
from fmdistill.images import build as build_images
from fmdistill.logs import progress
from fmdistill.mini.labelled import COLUMN, check_size
from fmdistill.mini.sam import MiniSam, check_makes_masks, must_make_masks
from fmdistill.mini.scenes import decode_labels
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

Size = tuple[int, int]
MEASURES = ("best", "picked", "single", "ceiling")
HELP = (
    "mIoU × 100 with the scenes' exact masks, one point an object: `best` of three masks, `picked` by predicted IoU, "
    "`single`, and `ceiling`, the exact mask at the resolution of the logits."
)


@dataclass(frozen=True)
class SceneMiou:
    """Judge one point per object, the visible pixel furthest from the object's edge; logits > 0 at H x W.

    `best` is the best of masks 1 to 3, `picked` the one with the top predicted IoU, `single` mask 0, `ceiling` the
    true mask averaged onto the 4g x 4g logits and upsampled like them, which is the best that this resolution allows.
    """

    points_per_batch: int = 64
    images: int | None = None
    device: str = "auto"

    metrics: ClassVar[Mapping[str, Metric]] = {
        "miou": Metric("mIoU", across="mask", percent=True, better="higher", end=1.0, help=HELP)
    }

    def __post_init__(self) -> None:
        """Raise a UserError for settings that would measure nothing."""
        if self.points_per_batch < 1:
            raise UserError(f"points_per_batch={self.points_per_batch}: needs at least 1")
        if self.images is not None and self.images < 1:
            raise UserError(f"images={self.images}: needs at least 1, or null for all")

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a student that makes no masks."""
        check_makes_masks(recipe.student.get("name"), "scene_miou")

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module]) -> Judged:
        """Score a promptable student on the exact masks of the recipe's validation images."""
        ((name, model),) = students.items()
        student = must_make_masks(model, recipe.student["name"], "scene_miou").to(pick_device(self.device, "device"))
        cases = _cases(build_images(recipe.images), student)
        cases = progress(cases, "scene_miou", total=self.images, unit="image")
        return run(self, student.head, cases, name)


@dataclass(frozen=True)
class SceneCase:
    """A scene to judge: float32 embedding (C, g, g), int labels (H, W) with object ids above 0, resized (h, w)."""

    key: str
    embedding: Tensor
    labels: np.ndarray
    resized: Size


def bucket(share: float) -> str:
    """Return the area bucket of an object that covers `share` of its image."""
    return next(name for top, name in SHARES if share < top)


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


def run(protocol: SceneMiou, head: PromptHead, cases: Iterable[SceneCase], subject: str = STUDENT) -> Judged:
    """Return the rows of all objects of all images, and details {"objects": one each}."""
    device = pick_device(protocol.device, "device")
    head = head.to(device).eval()
    objects = []
    for case in stop.between(itertools.islice(cases, protocol.images)):
        scores = scene_rows(head, case.embedding.to(device), case.labels, case.resized, protocol.points_per_batch)
        objects += [{"key": case.key, "subject": subject} | row for row in scores]
    if not objects:
        raise UserError("scene_miou: no objects to evaluate; the source has no validation scenes")
    means = summarise(objects, subject)
    return means.rows(), {"objects": objects, **means.details()}


def summarise(objects: list[dict], subject: str) -> Means:
    """Return the means of each measure over all objects, and over those of each area bucket that has any."""
    means = Means()
    for name in (None, *(name for _, name in SHARES)):
        for measure in MEASURES:
            for row in objects:
                if name in (None, row["bucket"]):
                    means.add(row["key"], subject, "miou", [row[measure]], mask=measure, bucket=name)
    return means


def _cases(images: Images, student: MiniSam) -> Iterator[SceneCase]:
    """Yield the validation scenes with their exact masks and the student's embeddings."""
    for shard in (s for s in images.shards() if s.split == "validation"):
        for encoded in images.read(shard):
            if COLUMN not in encoded.extra:
                raise UserError(f"{shard.name}: image '{encoded.key}' has no {COLUMN}; scene_miou needs exact masks")
            labels: np.ndarray = decode_labels(encoded.extra[COLUMN])
            image = must_prepare(images, student.preprocess, encoded, shard.name)
            check_size(shard.name, encoded.key, (labels.shape[0], labels.shape[1]), image.original)
            (embedding,) = embed(student, student.preprocess, image.pixels[None], torch.tensor([image.size]))
            yield SceneCase(encoded.key, embedding, labels, image.size)


def _scores(head: PromptHead, embedding: Tensor, xy: Tensor, true_PHW: Tensor, resized: Size) -> dict[str, np.ndarray]:
    original = (true_PHW.shape[1], true_PHW.shape[2])
    true_PHW, xy = true_PHW.to(embedding.device), xy.to(embedding.device)
    labels = torch.ones(len(xy), 1, dtype=torch.int, device=xy.device)
    logits, predicted = head.decode(embedding, xy[:, None], labels, multimask=True)
    single, _ = head.decode(embedding, xy[:, None], labels, multimask=False)
    truth, ceiling = pack(true_PHW), head.downsample(true_PHW, resized)
    ious = []
    for mask in (*logits.split(1, dim=1), single, ceiling):  # mask by mask, to bound the memory
        ious.append(iou(truth, pack((head.upsample(mask, resized, original) > 0).squeeze(1))))
    three = np.stack(ious[:-2], axis=1)
    picked = np.take_along_axis(three, predicted.argmax(1, keepdim=True).cpu().numpy(), axis=1)[:, 0]
    return {"best": three.max(1), "picked": picked, "single": ious[-2], "ceiling": ious[-1]}


def _chunks(ids: list[int], size: int) -> Iterable[list[int]]:
    return (ids[i : i + size] for i in range(0, len(ids), size))
