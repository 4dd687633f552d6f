"""Equal weights for all valid entries."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fmdistill.distill.seen import Seen


@dataclass(frozen=True)
class Uniform:
    """Weight one for every valid entry."""

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights of the distance's shape: one for valid entries, zero for the others."""
        if distance.dim() == 1:
            return torch.ones_like(distance)
        assert seen.valid is not None
        return seen.valid.to(distance.dtype).expand_as(distance)
