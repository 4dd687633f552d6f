"""Collect a few validation images with weights and masks of teacher and students, as arrays to draw."""

# Legend: C channels, g patches a side, P points, h x w pixels of the resized image.

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmdistill import recipe as recipes
from fmdistill.backbones.fast_decoder import image_decoder
from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache import Cache, open_cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill.seen import Seen
from fmdistill.distill.tasks import Distill, open_task
from fmdistill.evaluate.grid_miou import choose
from fmdistill.report.rows import Run

GRID = 10  # points a side, one of which is shown
BATCH = 50  # points decoded at once
AREA = (0.03, 0.30)  # share of the image that the teacher's mask at the shown point may cover


@dataclass(frozen=True)
class Example:
    """One image: `weights` (g, g) by run and term; `masks` (h, w) bool at `point` (x, y), the teacher's first."""

    key: str
    group: str
    image: np.ndarray  # (h, w, 3) uint8
    weights: Mapping[str, np.ndarray]
    valid: np.ndarray  # (g, g) bool
    point: tuple[float, float] | None
    masks: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Opened:
    """A run's task, student and objective, as it ended."""

    name: str
    task: Distill


@torch.inference_mode()
def gather(runs: list[Run], per_group: int = 3, trust: bool = False) -> tuple[list[Example], int]:
    """Return examples, `per_group` of each group of validation images, and the stride of a patch in pixels.

    Runs of another cache than the first run's are left out. UserError if images, cache or students are missing,
    or if a run names code and `trust` is false.
    """
    cache, opened = open_runs(runs, trust)
    head = None if cache.record.head is None else cache.head()
    data = CachedImages(cache, "validation")
    if "embedding" not in cache.shapes:
        return [], cache.preprocess.stride
    return [_example(data, place, cache, head, opened) for place in _places(data, per_group)], cache.preprocess.stride


def open_runs(runs: list[Run], trust: bool = False) -> tuple[Cache, list[Opened]]:
    """Return the first run's cache, and the opened runs that learned from it; errors as for `gather`."""
    for run in runs:
        recipes.load_saved(run.folder, ["trust=true"] if trust else [])
    first = runs[0].recipe
    same = [run for run in runs if run.recipe.cache == first.cache]
    opened = [Opened(run.name, open_task(run.folder, trust)[1]) for run in same]
    return open_cache(first), opened


def choose_point(
    teacher_Phw: Tensor, students_Phw: Iterable[Tensor], predicted_P: Tensor, image_area: float
) -> int | None:
    """Return the point whose masks differ most between the students, relative to the teacher's mask; None without one.

    Masks are bool (P, h, w). Only points whose teacher mask covers a share of `image_area` within AREA count. A single
    student is shown where the teacher is surest of its mask.
    """
    area_P = teacher_Phw.flatten(1).sum(1).float()
    fits_P = (area_P >= AREA[0] * image_area) & (area_P <= AREA[1] * image_area)
    if not fits_P.any():
        return None
    students = list(students_Phw)
    score_P = predicted_P
    if len(students) > 1:
        differing = [(a ^ b).flatten(1).sum(1) for i, a in enumerate(students) for b in students[:i]]
        score_P = torch.stack(differing).amax(0) / area_P.clamp_min(1)
    return int(score_P.masked_fill(~fits_P, -torch.inf).argmax())


def _places(data: CachedImages, per_group: int) -> list[tuple[int, int]]:
    groups: dict[str, list[tuple[int, int]]] = {}
    for i, shard in enumerate(data.shards):
        groups.setdefault(shard.group, []).extend((i, j) for j in range(len(shard.keys)))
    spread = {g: sorted({round(i) for i in np.linspace(0, len(p) - 1, per_group)}) for g, p in groups.items() if p}
    return [groups[group][i] for group, indices in spread.items() for i in indices]


def _example(data: CachedImages, place: tuple[int, int], cache: Cache, head: Any, opened: list[Opened]) -> Example:
    batch = data.batch([place])
    h, w = batch["sizes"][0].tolist()
    valid = cache.preprocess.valid(batch["sizes"])
    embeddings = {"teacher": batch["outputs"][f"{cache.family}.embedding"][0]}
    weights = {}
    for run in opened:
        seen = run.task.see(batch)
        embeddings[run.name] = seen.student("embedding")[0]
        weights |= _weights(run, seen, valid.shape[-1])
    point, masks = _masks(head, embeddings, (h, w)) if isinstance(head, PromptHead) else (None, {})
    image = batch["pixels"][0, :, :h, :w].permute(1, 2, 0).numpy()
    group = data.shards[place[0]].group
    return Example(batch["keys"][0], group, image, weights, valid[0].numpy(), point, masks)


def _weights(run: Opened, seen: Seen, g: int) -> dict[str, np.ndarray]:
    """Return the weights (g, g) of each term that weighs patches differently."""
    return {
        name: weight.view(g, g).numpy()
        for name, weight, focused in term_weights(run, seen)
        if weight.dim() == 2 and weight.shape[1] == g * g and float(weight[focused.valid].std()) > 0
    }


def term_weights(run: Opened, seen: Seen) -> Iterator[tuple[str, Tensor, Seen]]:
    """Yield each term's name, its weights (B,) or (B, N), and its view of the batch."""
    for name, term in run.task.objective.items():
        _, weight, focused = term.measure(seen)
        yield run.name if len(run.task.objective.terms) == 1 else f"{run.name}, {name}", weight, focused


def _masks(
    head: PromptHead, embeddings: Mapping[str, Tensor], resized: tuple[int, int]
) -> tuple[tuple[float, float] | None, dict[str, np.ndarray]]:
    centres = (torch.arange(GRID) + 0.5) / GRID
    points_P2 = torch.cartesian_prod(centres * resized[1], centres * resized[0])
    low, predicted = {}, {}
    for name, embedding in embeddings.items():
        low[name], predicted[name] = _best(head, embedding, points_P2)
    share = low["teacher"].shape[-1] / head.config["image_size"]
    inside = tuple(slice(0, max(1, round(n * share))) for n in resized)
    bits = {name: logits[(slice(None), *inside)] > 0 for name, logits in low.items()}
    students = [mask for name, mask in bits.items() if name != "teacher"]
    chosen = choose_point(bits["teacher"], students, predicted["teacher"], bits["teacher"][0].numel())
    if chosen is None:
        return None, {}
    masks = {
        name: (head.upsample(logits[None, chosen : chosen + 1], resized, resized)[0, 0] > 0).numpy()
        for name, logits in low.items()
    }
    x, y = points_P2[chosen].tolist()
    return (x, y), masks


def _best(head: PromptHead, embedding: Tensor, points_P2: Tensor) -> tuple[Tensor, Tensor]:
    """Return each point's mask with the top predicted IoU: logits (P, 4g, 4g) and that IoU (P,)."""
    decode, parts = image_decoder(head, embedding), []
    for points in points_P2.split(BATCH):
        logits_PMnn, iou_PM = decode(points[:, None], torch.ones(len(points), 1, dtype=torch.int))
        parts.append((choose(logits_PMnn, iou_PM, "best_predicted")[:, 0], iou_PM.amax(1)))
    logits_Pnn, iou_P = (torch.cat(part) for part in zip(*parts, strict=True))
    return logits_Pnn, iou_P
