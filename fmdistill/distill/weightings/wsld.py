"""Weighted soft label distillation (WSLD)."""

# Legend: B images, K classes.

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.distances.kd import require_logits
from fmdistill.distill.seen import Seen, at_least_float32
from fmdistill.distill.weightings.groups import mean_one_in_batch, require_whole_images

SETTING = "weighting.name=wsld"


@dataclass(frozen=True)
class WSLD:
    """w = 1 - exp(-CE(student, label) / CE(teacher, label)): samples with a larger student loss count more.

    (Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective", ICLR 2021;
    with 1e-7 added to the teacher's cross-entropy, as in the authors' code.) Both are at temperature 1.

    As in the paper, weights lie in [0, 1) and their mean is not one, unless `normalize` makes it one over the batch.
    The paper's loss is the cross-entropy plus 2.5 T^2 mean(w CE(p_t, p_s)) at T = 2: a term of `cross_entropy`, and one
    of `kd` at temperature 2, which includes T^2, with this weighting and scale 2.5. `kd` lacks the teacher's entropy,
    which does not depend on the student, so the value differs but the gradient does not.
    """

    logits: str = "logits"  # the output of student and teacher that is compared with the labels
    normalize: bool = False

    @torch.no_grad()
    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights (B,) for a distance (B,). Raises UserError for a distance of patches, or without labels."""
        require_whole_images(distance, seen.output, SETTING)
        student_B, teacher_B = (
            F.cross_entropy(require_logits(logits, SETTING), seen.labels(SETTING), reduction="none")
            for logits in (seen.student(self.logits), at_least_float32(seen.teacher(self.logits)))
        )
        weight_B = -torch.expm1(-student_B / (teacher_B + 1e-7))
        return mean_one_in_batch(weight_B) if self.normalize else weight_B
