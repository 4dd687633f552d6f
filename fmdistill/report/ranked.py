"""Which whole images an objective weighs most and least, for teachers that give an image one vector."""

# Legend: B images weighed together.

from dataclasses import dataclass

import numpy as np
import torch

from fmdistill.cache.dataset import CachedImages
from fmdistill.distill.data import every
from fmdistill.distill.loader import batches
from fmdistill.report.examples import open_runs, term_weights
from fmdistill.report.rows import Run

BATCH = 256  # images weighed together, the first of the validation split


@dataclass(frozen=True)
class Ranked:
    """The images (h, w, 3) uint8 that `name` weighs most, heaviest first, and least, lightest last, and the weights."""

    name: str
    images: list[np.ndarray]
    weights: list[float]
    weighed: int  # images in all


@torch.inference_mode()
def gather(runs: list[Run], shown: int = 12, trust: bool = False) -> list[Ranked]:
    """Return for each term with differing weights of whole images `shown` of them, half from either end."""
    cache, opened = open_runs(runs, trust)
    data = CachedImages(cache, "validation")
    places = [place for (place,) in every(data, 1)][:BATCH]
    if not places or all(len(shape) > 1 for shape in cache.shapes.values()):
        return []
    batch = next(batches(data, [places], workers=0))
    found = []
    for run in opened:
        for name, weight, _ in term_weights(run, run.task.see(batch)):
            if weight.dim() == 1 and float(weight.std()) > 0:
                order = weight.argsort(descending=True).tolist()
                chosen = order if len(order) <= shown else [*order[: shown // 2], *order[-(shown - shown // 2) :]]
                pictures = [batch["pixels"][i].permute(1, 2, 0).numpy() for i in chosen]
                found.append(Ranked(name, pictures, [float(weight[i]) for i in chosen], len(places)))
    return found
