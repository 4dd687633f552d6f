"""Mean squared error over channels."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MSE:
    """Mean over the channels of the squared difference, one value per sample or patch."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Map (B, C) vectors to (B,), or (B, C, H, W) maps to (B, H W)."""
        distance = (student.float() - teacher.float()).square().mean(1)
        return distance.flatten(1) if distance.dim() > 1 else distance
