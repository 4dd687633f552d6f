"""Weighted soft label distillation (WSLD)."""

# Legend: B images, K classes.

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.distances.kd import only_logits
from fmdistill.distill.seen import Seen, exact
from fmdistill.distill.weightings.groups import mean_one_in_batch, refuse_patches

ASKING = "weighting.name=wsld"


@dataclass(frozen=True)
class WSLD:
    """w = 1 - exp(-CE(student, label) / CE(teacher, label)): a sample counts the more, the worse the student is at it.

    (Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective", ICLR 2021;
    with the 1e-7 beside the teacher's cross-entropy that the authors' code has.) Both at temperature 1.

    The paper's weights lie in [0, 1) and their mean is not one, so nor is it here, unless `normalize` makes it one over
    the batch. Its loss is the cross-entropy plus 2.5 T^2 mean(w CE(p_t, p_s)) at T = 2: a term of `cross_entropy`, and
    one of `kd` at temperature 2, which includes T^2, with this weighting and scale 2.5. `kd` lacks the teacher's
    entropy, which no student changes, so the value differs and the gradient does not.
    """

    logits: str = "logits"  # the output of student and teacher that the labels judge
    normalize: bool = False

    @torch.no_grad()
    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return (B,) weights for (B,). UserError for distances of patches, and where the images carry no labels."""
        refuse_patches(distance, seen.output, ASKING)
        student_B, teacher_B = (
            F.cross_entropy(only_logits(logits, ASKING), seen.labels(ASKING), reduction="none")
            for logits in (seen.student(self.logits), exact(seen.teacher(self.logits)))
        )
        weight_B = -torch.expm1(-student_B / (teacher_B + 1e-7))
        return mean_one_in_batch(weight_B) if self.normalize else weight_B
