"""Inverse probability weighting for distillation (IPWD), in one stage."""

# Legend: B images, D channels, K classes.

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.distill.distances.kd import only_logits
from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import mean_one_in_batch, refuse_patches
from fmdistill.registry import UserError, suggest

ASKING = "weighting.name=ipwd"


class IPWD(nn.Module):
    """Weigh a sample by one over its propensity to be among what the teacher's knowledge covers: a reconstruction.

    (Niu et al., "Respecting Transfer Gap in Knowledge Distillation", NeurIPS 2022.) Known is the idea, from the
    abstract, and from a summary by others w = 1 + H_cls / H_kd, with standardised logits and a second head on the
    student that learns from labels alone. H is the cross-entropy of a head against the label: H_kd of the student's own
    head, H_cls of the second. The paper's equations and code were not at hand, so no parity is claimed. Ours are:

    - `direction`: that summary's "cls_over_kd" weighs up where the distilled head is the better one; "kd_over_cls" is
      what the word "under-represented" suggests. Which one the paper means is open;
    - the second head is one linear layer on the student's `feature`, detached, so it cannot change the student;
    - each sample's logits are standardised by their mean and population standard deviation over the classes;
    - weights are clipped to 1 to `largest`; before `start_epoch` they are one; none is averaged over epochs.

    The mean is above one, as the summary's is, unless `normalize` makes it one over the batch. The whole loss is
    alpha cross-entropy + beta KD with this weighting, alpha and beta unknown, and the second head's own cross-entropy,
    which the term adds by itself, unscaled.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        direction: Literal["cls_over_kd", "kd_over_cls"] = "cls_over_kd",
        feature: str = "feature",
        logits: str = "logits",
        largest: float = 10.0,
        start_epoch: float = 0.0,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if not largest >= 1:
            raise UserError(f"weighting.largest={largest}: expected a weight of at least 1")
        if not start_epoch >= 0:
            raise UserError(f"weighting.start_epoch={start_epoch}: expected epochs, 0 for none")
        self.direction, self.feature, self.logits = direction, feature, logits
        self.largest, self.start_epoch, self.normalize = largest, start_epoch, normalize
        self.head = nn.Linear(_width(shapes, "feature", feature), _width(shapes, "logits", logits))

    @torch.no_grad()
    def forward(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return (B,) weights for (B,). UserError for distances of patches, and where the images carry no labels."""
        refuse_patches(distance, seen.output, ASKING)
        if seen.epoch is not None and seen.epoch < self.start_epoch:
            return torch.ones_like(distance)
        kd_B, cls_B = (
            standardised_cross_entropy(logits, seen.labels(ASKING))
            for logits in (only_logits(seen.student(self.logits), ASKING), self._second(seen))
        )
        over_B, under_B = (cls_B, kd_B) if self.direction == "cls_over_kd" else (kd_B, cls_B)
        weight_B = (1 + over_B / (under_B + 1e-8)).clamp(1, self.largest)
        return mean_one_in_batch(weight_B) if self.normalize else weight_B

    def auxiliary(self, seen: Seen) -> Tensor:
        """Return the second head's cross-entropy against the label, (B,)."""
        return F.cross_entropy(self._second(seen), seen.labels(ASKING), reduction="none")

    def _second(self, seen: Seen) -> Tensor:
        return self.head(seen.student(self.feature).detach().to(self.head.weight.dtype))


def standardised_cross_entropy(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Return each sample's cross-entropy (B,) against its label, of logits with mean zero and deviation one."""
    return F.cross_entropy(F.layer_norm(logits_BK, logits_BK.shape[1:], eps=1e-12), label_B, reduction="none")


def _width(shapes: Mapping[str, tuple[int, ...]], argument: str, output: str) -> int:
    """Return how many channels the student's `output` has. UserError where it has none, or is a map."""
    own = {name.removeprefix("student."): shape for name, shape in shapes.items() if name.startswith("student.")}
    if output not in own:
        raise UserError(
            f"weighting.{argument}={output}: the student has none, and ipwd needs its {argument}."
            f"{suggest(output, own)} Choose one of these, or a student that makes it"
        )
    if len(own[output]) != 1:
        raise UserError(
            f"weighting.{argument}={output}: the student's is a map {own[output]}; ipwd needs one vector per image"
        )
    return own[output][0]
