"""Rank images by the weight that an objective gives them, for teachers whose output is one vector per image."""

# Legend: B images weighed together.

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fmdistill.cache.dataset import CachedImages
from fmdistill.distill.data import every
from fmdistill.report import named
from fmdistill.report.examples import open_runs, term_weights
from fmdistill.report.rows import Run

BATCH = 256  # images weighed together, the first of the validation split


@dataclass(frozen=True)
class Ranked:
    """Images (h, w, 3) uint8 with their weights in the term `name`: its heaviest ones, then its lightest, in order."""

    name: str
    images: list[np.ndarray]
    weights: list[float]
    weighed: int  # images in all, of which these are the two ends


@torch.inference_mode()
def gather(runs: list[Run], shown: int = 12, trust: bool = False, images: Sequence[str] = ()) -> list[Ranked]:
    """Return, for each term that weighs whole images differently, `shown` images, half from either end.

    If `images` are named (`named.batches`), these are weighed, all as one batch.
    """
    cache, opened = open_runs(runs, trust)
    if all(len(shape) > 1 for shape in cache.shapes.values()):
        return []
    if images:
        batch = named.merged([batch for _, batch in named.batches(images, runs[0].recipe, cache)])
    else:
        data = CachedImages(cache, "validation")
        places = [(shard, index) for ((_, shard, index),) in every(data, 1)][:BATCH]
        if not places:
            return []
        batch = data.batch(places)
    ranked = []
    for run in opened:
        for name, weight, _ in term_weights(run, run.task.see(batch)):
            if weight.dim() == 1 and float(weight.std()) > 0:
                order = weight.argsort(descending=True).tolist()
                chosen = order if len(order) <= shown else [*order[: shown // 2], *order[-(shown - shown // 2) :]]
                pictures = [batch["pixels"][i].permute(1, 2, 0).numpy() for i in chosen]
                ranked.append(Ranked(name, pictures, [float(weight[i]) for i in chosen], len(order)))
    return ranked
