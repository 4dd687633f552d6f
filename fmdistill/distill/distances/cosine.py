"""Cosine distance."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.distances.mse import check_shapes


@dataclass(frozen=True)
class Cosine:
    """One minus the cosine over the channels, in [0, 2], one value per sample or patch."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Map (B, C) vectors to (B,), or (B, C, H, W) maps to (B, H W)."""
        check_shapes(student, teacher)
        distance = 1 - F.cosine_similarity(student, teacher, dim=1)
        return distance.flatten(1) if distance.dim() > 1 else distance
