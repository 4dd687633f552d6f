"""Weights per training image that finished runs leave behind, for the weighting `by_key`."""

# Legend: B images, N patches an image.

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fmdistill import stop
from fmdistill.cache.batch import Batch
from fmdistill.distill.data import every
from fmdistill.distill.distances.pad import PAD
from fmdistill.distill.loader import batches
from fmdistill.distill.student import load_student
from fmdistill.distill.tasks import Job, open_task
from fmdistill.distill.weightings.ipwd import standardised_cross_entropy
from fmdistill.files import check_folder, write_whole
from fmdistill.logs import log, progress
from fmdistill.registry import UserError

BATCH = 64


def by_pad(run: str | Path, out: str | Path, trust: bool = False) -> Path:
    """Write {key: 1 / variance} of a finished run's PAD to `out`, the variance its mean over channels and patches.

    "Weights from PAD" of the PAD paper (Zhang et al., ECCV 2020, Table 1): a trained PAD's variances, kept fixed.
    """
    check_folder(Path(out).parent, "the weights")
    job, task = open_task(run, trust)
    found = [(term.distance, term.settings) for _, term in task.objective.items() if isinstance(term.distance, PAD)]
    if len(found) != 1:
        raise UserError(f"{run}: {len(found)} of its objective's terms are a PAD; give the run of a recipe with one")
    pad, settings = found[0]

    def weigh(batch: Batch) -> Tensor:
        variance = pad.variance(task.see(batch).focus(settings.output, settings.padding))
        return 1 / variance.flatten(1).mean(1) if variance.dim() > 1 else 1 / variance

    return _write(job, weigh, out)


def by_propensity(run: str | Path, label_run: str | Path, out: str | Path, trust: bool = False) -> Path:
    """Write {key: 1 + H_cls / H_kd} to `out`: the two-stage IPWD, reconstructed as `IPWD` says.

    H is the cross-entropy against the label: H_kd of `run`'s student, which was distilled, H_cls of `label_run`'s,
    which learned from labels alone. The other direction is had by exchanging the two.
    """
    check_folder(Path(out).parent, "the weights")
    job, task = open_task(run, trust)
    other = load_student(label_run, trust)

    def weigh(batch: Batch) -> Tensor:
        seen = task.see(batch)
        labels_B = seen.labels("fmdistill weigh ipwd")
        logits_BK = other(task.preprocess.normalize(batch["pixels"], batch["sizes"]))["logits"]
        kd_B, cls_B = (standardised_cross_entropy(z, labels_B) for z in (seen.student("logits"), logits_BK))
        return 1 + cls_B / (kd_B + 1e-8)

    return _write(job, weigh, out)


@torch.no_grad()
def _write(job: Job, weigh: Callable[[Batch], Tensor], out: str | Path) -> Path:
    listed: dict[str, float] = {}
    places = list(every(job.train, BATCH))
    for batch in stop.between(progress(batches(job.train, places, 0), "weighing", total=len(places))):
        batch = batch if job.complete is None else job.complete(batch)
        listed |= dict(zip(batch["keys"], weigh(batch).tolist(), strict=True))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(listed, indent=1))
    weight = torch.tensor(list(listed.values()))
    size = float(weight.sum().square() / (len(weight) * weight.square().sum()))
    log.info("%s: %d images, weights %.3g to %.3g, ESS %.3f", path, len(listed), weight.min(), weight.max(), size)
    return path
