"""Similarities between the patches of one image."""

# Legend: B images, C channels, N = H W patches.

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


@dataclass(frozen=True)
class TokenSimilarity:
    """KL(p_t || p_s) of each patch's similarities to its image's patches, one value per patch.

    p = softmax over the patches j of cos(x_i, x_j) / `temperature`, without those that `padding: exclude` leaves out.
    The student learns which patches belong together, whatever its channels. (As SP, but within an image; the term of
    lightly-train's third distillation method, at its temperature 0.07.) Memory grows with N^2: 67 MB for each of
    several matrices of one image of 64 x 64 patches.
    """

    temperature: float = 0.07

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"distance.temperature={self.temperature}: expected a number above 0")

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B, N) for maps (B, C, H, W) that may differ in C. Raises UserError for vectors, or other H and W."""
        student, teacher = seen.pair()
        if student.dim() != 4 or teacher.dim() != 4 or student.shape[2:] != teacher.shape[2:]:
            raise UserError(
                f"distance.name=token_similarity: compares the patches of one image, on one grid, but the student's "
                f"output for an image has shape {tuple(student.shape[1:])}, the teacher's {tuple(teacher.shape[1:])}; "
                f"choose outputs that are maps of one grid, or compare images by sp"
            )
        student_BNN = self._log_probability(student, seen.valid)
        with torch.no_grad():
            teacher_BNN = self._log_probability(teacher, seen.valid)
        return F.kl_div(student_BNN, teacher_BNN, reduction="none", log_target=True).sum(2)

    def _log_probability(self, map_BCHW: Tensor, valid: Tensor | None) -> Tensor:
        unit_BCN = F.normalize(map_BCHW.flatten(2), dim=1)
        logits_BNN = unit_BCN.transpose(1, 2) @ unit_BCN / self.temperature
        if valid is not None:
            logits_BNN = logits_BNN.masked_fill(~valid[:, None], -1e9)  # finite, so that the gap of two is zero
        return logits_BNN.log_softmax(2)
