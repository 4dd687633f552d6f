"""Cosine distance and smooth L1 in one, as for the agglomerative students of several teachers."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.distances.mse import require_same_shape
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


@dataclass(frozen=True)
class Balanced:
    """`cosine` (1 - cos(s, t)) + `smooth_l1` times the smooth L1 over the channels, one value per sample or patch.

    The cosine teaches the direction and the smooth L1, the mean over the channels of d^2 / (2 beta) for |d| < beta and
    of |d| - beta / 2 beyond, the length too. (Ranzinger et al., "AM-RADIO: Agglomerative Vision Foundation Model",
    CVPR 2024: 0.9 and 0.1, as here; EUPE has the same for patches, UNIC 0.5 and 0.5.) Smooth L1 depends on the
    scale of the outputs, so standardise them (`standardize`), unless their deviation is about one.
    """

    cosine: float = 0.9
    smooth_l1: float = 0.1
    beta: float = 1.0

    def __post_init__(self) -> None:
        if not (self.cosine >= 0 and self.smooth_l1 >= 0 and self.cosine + self.smooth_l1 > 0 and self.beta > 0):
            raise UserError(
                f"distance.cosine={self.cosine}, distance.smooth_l1={self.smooth_l1}, distance.beta={self.beta}: "
                f"expected weights of at least 0, one of them above, and a beta above 0"
            )

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors (B, C), or (B, H W) for maps (B, C, H, W)."""
        student, teacher = require_same_shape(seen)
        angle = 1 - F.cosine_similarity(student, teacher, dim=1)
        gap = F.smooth_l1_loss(student, teacher, reduction="none", beta=self.beta).mean(1)
        distance = torch.add(self.cosine * angle, gap, alpha=self.smooth_l1)
        return distance.flatten(1) if distance.dim() > 1 else distance
