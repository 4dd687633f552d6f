"""Cosine distance."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.distances.mse import require_same_shape
from fmdistill.distill.seen import Seen


@dataclass(frozen=True)
class CosineDistance:
    """One minus the cosine similarity over the channels, in [0, 2], one value per sample or patch."""

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors (B, C), or (B, H W) for maps (B, C, H, W)."""
        student, teacher = require_same_shape(seen)
        distance = 1 - F.cosine_similarity(student, teacher, dim=1)
        return distance.flatten(1) if distance.dim() > 1 else distance
