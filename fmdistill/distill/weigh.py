"""Weights per training image, computed from finished runs, for the weighting `by_key`."""

# Legend: B images, N patches per image.

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fmdistill import stop
from fmdistill.cache.batch import Batch
from fmdistill.distill.data import every
from fmdistill.distill.distances.pad import PAD
from fmdistill.distill.job import Job
from fmdistill.distill.loader import batches
from fmdistill.distill.student import load_student
from fmdistill.distill.tasks import open_task
from fmdistill.distill.weightings.ipwd import standardised_cross_entropy
from fmdistill.files import check_folder, write_whole
from fmdistill.logs import log, progress
from fmdistill.registry import UserError

BATCH = 64


def by_pad(run: str | Path, out: str | Path, trust: bool = False) -> Path:
    """Write {key: 1 / variance} to `out`, from the PAD distance of a finished run; return the path.

    The variance is averaged over channels and patches. "Weights from PAD" of the PAD paper (Zhang et al., ECCV 2020,
    Table 1): the variances of a trained PAD, held fixed. Raises UserError unless the run has exactly one PAD term.
    """
    check_folder(Path(out).parent, "the weights")
    job, task = open_task(run, trust)
    pads = [(term.distance, term) for _, term in task.objective.items() if isinstance(term.distance, PAD)]
    if len(pads) != 1:
        raise UserError(f"{run}: {len(pads)} terms of its objective are a PAD; choose a run with exactly one")
    pad, term = pads[0]

    def weigh(batch: Batch) -> Tensor:
        variance = pad.variance(term.standardised(term.focus(task.see(batch))))
        return 1 / variance.flatten(1).mean(1) if variance.dim() > 1 else 1 / variance

    return _write(job, weigh, out)


def by_propensity(run: str | Path, label_run: str | Path, out: str | Path, trust: bool = False) -> Path:
    """Write {key: 1 + H_cls / H_kd} to `out`, the weights of the two-stage IPWD; return the path.

    H is the cross-entropy against the label: H_kd that of `run`'s student, which was distilled, and H_cls that of
    `label_run`'s student, which learned from labels alone. Exchange the two runs for the other direction. It is a
    reconstruction, as described at `IPWD`.
    """
    check_folder(Path(out).parent, "the weights")
    job, task = open_task(run, trust)
    label_student = load_student(label_run, trust)

    def weigh(batch: Batch) -> Tensor:
        seen = task.see(batch)
        labels_B = seen.labels("fmdistill weigh ipwd")
        logits_BK = label_student(task.preprocess.normalize(batch["pixels"], batch["sizes"]))["logits"]
        kd_B, cls_B = (standardised_cross_entropy(z, labels_B) for z in (seen.student("logits"), logits_BK))
        return 1 + cls_B / (kd_B + 1e-8)

    return _write(job, weigh, out)


@torch.no_grad()
def _write(job: Job, weigh: Callable[[Batch], Tensor], out: str | Path) -> Path:
    weights: dict[str, float] = {}
    places = list(every(job.train, BATCH))
    for batch in stop.between(progress(batches(job.train, places, 0), "weighing", total=len(places))):
        batch = batch if job.complete is None else job.complete(batch)
        weights |= dict(zip(batch["keys"], weigh(batch).tolist(), strict=True))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(weights, indent=1))
    weight = torch.tensor(list(weights.values()))
    size = float(weight.sum().square() / (len(weight) * weight.square().sum()))
    log.info(
        "%s: %d images, weights %.3g to %.3g, effective sample size %.3f",
        path, len(weights), weight.min(), weight.max(), size,
    )  # fmt: skip
    return path
