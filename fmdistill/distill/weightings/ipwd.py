"""Inverse probability weighting for distillation (IPWD), in one stage."""

# Legend: B images, D channels, K classes.

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.distill.distances.kd import require_logits
from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import mean_one_in_batch, require_whole_images
from fmdistill.registry import UserError, suggest

SETTING = "weighting.name=ipwd"


class IPWD(nn.Module):
    """Weighs a sample by the inverse of its propensity to be covered by the teacher's knowledge: a reconstruction.

    (Niu et al., "Respecting Transfer Gap in Knowledge Distillation", NeurIPS 2022.) The idea is known from the
    abstract; w = 1 + H_cls / H_kd, standardised logits and a second head on the student that learns from labels alone
    are known from a summary by others. H is the cross-entropy of a head against the label: H_kd of the student's own
    head, H_cls of the second. The paper's equations and code were not available, so no parity is claimed. Our choices:

    - `direction`: the summary's "cls_over_kd" raises the weight if the distilled head is the better one; "kd_over_cls"
      follows the paper's word "under-represented". Which one the paper means is open;
    - the second head is one linear layer on the student's `feature`, detached, so it cannot change the student;
    - each sample's logits are standardised by their mean and population standard deviation over the classes;
    - weights are clipped to [1, `largest`], are one before `start_epoch`, and are not averaged over epochs.

    The mean is above one, as in the summary, unless `normalize` makes it one over the batch. The whole loss is
    alpha cross-entropy + beta KD with this weighting, alpha and beta unknown, plus the second head's own cross-entropy,
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
            raise UserError(f"weighting.start_epoch={start_epoch}: expected a number of epochs, at least 0")
        self.direction, self.feature, self.logits = direction, feature, logits
        self.largest, self.start_epoch, self.normalize = largest, start_epoch, normalize
        self.head = nn.Linear(_width(shapes, "feature", feature), _width(shapes, "logits", logits))

    @torch.no_grad()
    def forward(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights (B,) for a distance (B,). Raises UserError for a distance of patches, or without labels."""
        require_whole_images(distance, seen.output, SETTING)
        if seen.epoch is not None and seen.epoch < self.start_epoch:
            return torch.ones_like(distance)
        kd_B, cls_B = (
            standardised_cross_entropy(logits, seen.labels(SETTING))
            for logits in (require_logits(seen.student(self.logits), SETTING), self._second(seen))
        )
        over_B, under_B = (cls_B, kd_B) if self.direction == "cls_over_kd" else (kd_B, cls_B)
        weight_B = (1 + over_B / (under_B + 1e-8)).clamp(1, self.largest)
        return mean_one_in_batch(weight_B) if self.normalize else weight_B

    def auxiliary(self, seen: Seen) -> Tensor:
        """Return the second head's cross-entropy against the label, (B,)."""
        return F.cross_entropy(self._second(seen), seen.labels(SETTING), reduction="none")

    def _second(self, seen: Seen) -> Tensor:
        return self.head(seen.student(self.feature).detach().to(self.head.weight.dtype))


def standardised_cross_entropy(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Return each sample's cross-entropy (B,) against its label, after standardising its logits."""
    return F.cross_entropy(F.layer_norm(logits_BK, logits_BK.shape[1:], eps=1e-12), label_B, reduction="none")


def _width(shapes: Mapping[str, tuple[int, ...]], argument: str, output: str) -> int:
    """Return the width of the student's `output`. Raises UserError if the student lacks it or it is a map."""
    own = {name.removeprefix("student."): shape for name, shape in shapes.items() if name.startswith("student.")}
    if output not in own:
        raise UserError(
            f"weighting.{argument}={output}: the student has no such output, and ipwd needs its {argument}."
            f"{suggest(output, own)} Choose one of these, or a student that has it"
        )
    if len(own[output]) != 1:
        raise UserError(
            f"weighting.{argument}={output}: the student's output is a map {own[output]}; ipwd needs one vector per "
            f"image"
        )
    return own[output][0]
