"""Affinity mimicking (TinyCLIP)."""

# Legend: G images of the optimizer step and their captions, D the embedding's width.

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fmdistill.distill.distances.texts import (
    both_ways,
    check_captions,
    check_scale,
    teacher_factor,
    unit_images,
    unit_texts,
)
from fmdistill.distill.seen import Seen


@dataclass(frozen=True)
class Affinity:
    """Cross-entropy of the student's image-text affinities against the teacher's, one value per image.

    With unit vectors s_i of the student, u_i of the teacher and t_j of the captions, the affinities of image i are
    p_i = softmax_j(`teacher_scale` u_i . t_j) and q_i = softmax_j(`student_scale` s_i . t_j), over all captions of the
    optimizer step, and those of caption j are the same products' softmax over its images. Image i gets half of its own
    cross-entropy -sum_j p_ij log q_ij and half of its caption's, so that the mean over the step is the mean of both
    directions. (Wu et al., "TinyCLIP", ICCV 2023, with the student's scale of 50 of the authors' code; the text tower
    is the teacher's for both.)

    `teacher_scale` null is the teacher's own logit scale, which is not always the best: MobileCLIP2 (2025,
    Table 3) takes 50 to 90 for teachers whose own is 100. In training, memory grows with the square of the step's
    images.
    """

    teacher_scale: float | None = None
    student_scale: float = 50.0
    logit_scale: float | None = field(default=None, repr=False)
    shapes: Mapping[str, tuple[int, ...]] | None = field(default=None, repr=False)

    over_step: ClassVar[bool] = True
    needs_captions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_captions(self.shapes, "affinity")
        check_scale(self.student_scale, "distance.student_scale")
        if self.teacher_scale is not None:
            check_scale(self.teacher_scale, "distance.teacher_scale")

    def __call__(self, seen: Seen) -> Tensor:
        """Return (G,). Raises UserError for maps, and for a cache without captions."""
        factor = teacher_factor(self.teacher_scale, self.logit_scale)
        (student_GD, teacher_GD), (text_GD, _) = unit_images(seen, "affinity"), unit_texts(seen, "affinity")
        teacher_GG = factor * teacher_GD @ text_GD.T
        return both_ways(self.student_scale * student_GD @ text_GD.T, teacher_GG.softmax(1), teacher_GG.T.softmax(1))
