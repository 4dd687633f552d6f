"""Collect a few validation images with weights and masks of teacher and students, as arrays to draw."""

# Legend: C channels, g patches a side, P points, h x w pixels of the resized image.

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fmdistill import recipe as recipes
from fmdistill.backbones.fast_decoder import image_decoder
from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache import Cache, open_cache
from fmdistill.cache.batch import Batch
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill.refine import WHOLE_MASKS
from fmdistill.distill.seen import Seen
from fmdistill.distill.student import own_head
from fmdistill.distill.tasks import Distill, open_task
from fmdistill.evaluate.mask_choice import choose
from fmdistill.report import named
from fmdistill.report.rows import Run

GRID = 10  # points a side, two of which are shown
BATCH = 50  # points decoded at once
AREA = (0.03, 0.30)  # share of the image that the teacher's mask at the shown point may cover


@dataclass(frozen=True)
class PointMasks:
    """A point (x, y) in pixels, and each network's mask there, (h, w) bool, the teacher's first."""

    point: tuple[float, float]
    masks: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Example:
    """One image: `weights` (g, g) by run and term, and a prompt of each kind, "typical" and "worst", if it has any."""

    key: str
    group: str
    image: np.ndarray  # (h, w, 3) uint8
    weights: Mapping[str, np.ndarray]
    valid: np.ndarray  # (g, g) bool
    prompts: Mapping[str, PointMasks]


@dataclass(frozen=True)
class Opened:
    """A run's task, student and objective, as it ended."""

    name: str
    task: Distill


@torch.inference_mode()
def gather(
    runs: list[Run], per_group: int = 3, trust: bool = False, images: Sequence[str] = ()
) -> tuple[list[Example], int]:
    """Return examples, `per_group` of each group of validation images, and the stride of a patch in pixels.

    If `images` are named (`named.batches`), the examples are these. Runs of another cache than the first run's are left
    out. UserError if images, cache or students are missing, or if a run names code and `trust` is false.
    """
    cache, opened = open_runs(runs, trust)
    head = None if cache.record.head is None else cache.head()
    if "embedding" not in cache.shapes:
        return [], cache.preprocess.stride
    batches = named.batches(images, runs[0].recipe, cache) if images else _validation(cache, per_group)
    return [_example(group, batch, cache, head, opened) for group, batch in batches], cache.preprocess.stride


def open_runs(runs: list[Run], trust: bool = False) -> tuple[Cache, list[Opened]]:
    """Return the first run's cache, and the opened runs that learned from it; errors as for `gather`."""
    for run in runs:
        recipes.load_saved(run.folder, ["trust=true"] if trust else [])
    first = runs[0].recipe
    same = [run for run in runs if run.recipe.cache == first.cache]
    opened = [Opened(run.name, open_task(run.folder, trust)[1]) for run in same]
    return open_cache(first), opened


def choose_points(
    teacher_Phw: Tensor, students_Phw: Sequence[Tensor], image_area: float
) -> dict[Literal["typical", "worst"], int]:
    """Return the points at which the students' masks agree with the teacher's as at most points, and least.

    Masks are bool (P, h, w). The agreement of a point is the students' mean IoU with the teacher, and the typical point
    is the one of median agreement. Only points whose teacher mask covers a share of `image_area` within AREA count;
    without one, the result is empty.
    """
    area_P = teacher_Phw.flatten(1).sum(1)
    candidates = ((area_P >= AREA[0] * image_area) & (area_P <= AREA[1] * image_area)).nonzero()[:, 0]
    if not len(candidates):
        return {}
    teacher = teacher_Phw[candidates]
    agreement = torch.stack([_iou(teacher, student[candidates]) for student in students_Phw]).mean(0)
    order = agreement.argsort(stable=True)
    return {"typical": int(candidates[order[len(order) // 2]]), "worst": int(candidates[order[0]])}


def _iou(a_Phw: Tensor, b_Phw: Tensor) -> Tensor:
    return (a_Phw & b_Phw).flatten(1).sum(1) / (a_Phw | b_Phw).flatten(1).sum(1).clamp(min=1)


def _validation(cache: Cache, per_group: int) -> Iterator[tuple[str, Batch]]:
    data = CachedImages(cache, "validation")
    return ((data.shards[shard].group, data.batch([(shard, index)])) for shard, index in _places(data, per_group))


def _places(data: CachedImages, per_group: int) -> list[tuple[int, int]]:
    groups: dict[str, list[tuple[int, int]]] = {}
    for i, shard in enumerate(data.shards):
        groups.setdefault(shard.group, []).extend((i, j) for j in range(len(shard.keys)))
    spread = {g: sorted({round(i) for i in np.linspace(0, len(p) - 1, per_group)}) for g, p in groups.items() if p}
    return [groups[group][i] for group, indices in spread.items() for i in indices]


def _example(group: str, batch: Batch, cache: Cache, head: Any, opened: list[Opened]) -> Example:
    h, w = batch["sizes"][0].tolist()
    valid = cache.preprocess.valid(batch["sizes"])
    embeddings = {"teacher": batch["outputs"][f"{cache.family}.embedding"][0]}
    weights = {}
    for run in opened:
        seen = run.task.see(batch)
        embeddings[run.name] = seen.student("embedding")[0]
        weights |= _weights(run, seen, valid.shape[-1])
    prompts = {}
    if isinstance(head, PromptHead):
        heads = {"teacher": head} | {run.name: own_head(run.task.student) or head for run in opened}
        prompts = _prompts(heads, embeddings, (h, w))
    image = batch["pixels"][0, :, :h, :w].permute(1, 2, 0).numpy()
    return Example(batch["keys"][0], group, image, weights, valid[0].numpy(), prompts)


def _weights(run: Opened, seen: Seen, g: int) -> dict[str, np.ndarray]:
    """Return the weights (g, g) of each term that weighs patches differently."""
    return {
        name: weight.view(g, g).numpy()
        for name, weight, focused in term_weights(run, seen)
        if weight.dim() == 2
        and weight.shape[1] == g * g
        and focused.output not in WHOLE_MASKS
        and float(weight[focused.valid].std()) > 0
    }


def term_weights(run: Opened, seen: Seen) -> Iterator[tuple[str, Tensor, Seen]]:
    """Yield each term's name, its weights (B,) or (B, N), and its view of the batch."""
    for name, term in run.task.objective.items():
        _, weight, focused = term.measure(seen)
        yield run.name if len(run.task.objective.terms) == 1 else f"{run.name}, {name}", weight, focused


def _prompts(
    heads: Mapping[str, PromptHead], embeddings: Mapping[str, Tensor], resized: tuple[int, int]
) -> dict[str, PointMasks]:
    centres = (torch.arange(GRID) + 0.5) / GRID
    points_P2 = torch.cartesian_prod(centres * resized[1], centres * resized[0])
    low = {name: _best(heads[name], embedding, points_P2) for name, embedding in embeddings.items()}
    share = low["teacher"].shape[-1] / heads["teacher"].config["image_size"]
    inside = tuple(slice(0, max(1, round(n * share))) for n in resized)
    bits = {name: logits[(slice(None), *inside)] > 0 for name, logits in low.items()}
    students = [mask for name, mask in bits.items() if name != "teacher"]
    prompts = {}
    for kind, chosen in choose_points(bits["teacher"], students, bits["teacher"][0].numel()).items():
        masks = {
            name: (heads[name].upsample(logits[None, chosen : chosen + 1], resized, resized)[0, 0] > 0).numpy()
            for name, logits in low.items()
        }
        x, y = points_P2[chosen].tolist()
        prompts[kind] = PointMasks((x, y), masks)
    return prompts


def _best(head: PromptHead, embedding: Tensor, points_P2: Tensor) -> Tensor:
    """Return each point's mask with the top predicted IoU, logits (P, 4g, 4g)."""
    decode, parts = image_decoder(head, embedding), []
    for points in points_P2.split(BATCH):
        logits_PMnn, iou_PM = decode(points[:, None], torch.ones(len(points), 1, dtype=torch.int))
        parts.append(choose(logits_PMnn, iou_PM, "best_predicted")[:, 0])
    return torch.cat(parts)
