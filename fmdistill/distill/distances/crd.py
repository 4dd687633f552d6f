"""Contrastive relational distillation (CLIP-KD)."""

# Legend: G images of the optimizer step and their captions, D the embedding's width.

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fmdistill.distill.distances.texts import (
    FIRST_SCALE,
    LogitScale,
    both_ways,
    check_captions,
    check_scale,
    teacher_factor,
    unit_images,
    unit_texts,
)
from fmdistill.distill.seen import Seen


class CRD(nn.Module):
    """KL divergence of the student's contrastive distributions from the teacher's, one value per image.

    The distributions are those of `Affinity`, over the captions and the images of the optimizer step. Image i gets half
    of KL(p_i || q_i) of its own and half of its caption's. (Yang et al., "CLIP-KD", CVPR 2024: L_CRD, halved as in the
    authors' code.) For equal scales it differs from `Affinity` by the teacher's entropy alone, and so has its gradient.

    `student_scale` is learned, from CLIP's first value and up to 100, or fixed with `learned` false. `teacher_scale`
    null is the teacher's own. In training, memory grows with the square of the step's images.
    """

    over_step = True
    needs_captions = True

    def __init__(
        self,
        teacher_scale: float | None = None,
        student_scale: float = FIRST_SCALE,
        learned: bool = True,
        logit_scale: float | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        check_captions(shapes, "crd")
        if teacher_scale is not None:
            check_scale(teacher_scale, "distance.teacher_scale")
        self.teacher_scale, self.logit_scale = teacher_scale, logit_scale
        self.scale = LogitScale(student_scale, learned, "distance.student_scale")

    def forward(self, seen: Seen) -> Tensor:
        """Return (G,). Raises UserError for maps, and for a cache without captions."""
        factor = teacher_factor(self.teacher_scale, self.logit_scale)
        (student_GD, teacher_GD), (text_GD, _) = unit_images(seen, "crd"), unit_texts(seen, "crd")
        teacher_GG = factor * teacher_GD @ text_GD.T
        student_GG = self.scale() * student_GD @ text_GD.T
        image_GG, text_GG = teacher_GG.softmax(1), teacher_GG.T.softmax(1)
        entropy_G = -torch.xlogy(image_GG, image_GG).sum(1) - torch.xlogy(text_GG, text_GG).sum(1)
        return both_ways(student_GG, image_GG, text_GG) - entropy_G / 2
