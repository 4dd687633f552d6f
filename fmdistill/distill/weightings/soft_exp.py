"""Weights that fall exponentially with the distance."""

# Legend: B images, N patches per image, R groups of M entries.

from dataclasses import dataclass

from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import Group, check_group, grouped, minus_largest, softmax_weights
from fmdistill.registry import UserError


@dataclass(frozen=True)
class SoftExp:
    """w_i = exp(-d_i / temperature) / sum_j exp(-d_j / temperature): larger distances count less.

    (Zhang et al., "Prime-Aware Adaptive Distillation", ECCV 2020, Eq. 3.) The weights are multiplied by the number of
    entries, for a mean of one: the paper's sum to one, and its loss divides by that number again. That d is the term's
    distance, without gradient, is our reconstruction.
    """

    temperature: float = 1.0  # in units of the distance
    group: Group | None = None  # None = image for maps, batch for vectors

    def __post_init__(self) -> None:
        check_group(self.group)
        if not self.temperature > 0:
            raise UserError(f"weighting.temperature={self.temperature}: expected a number above 0")

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights of the shape of the distance, (B, N) for maps of N patches or (B,) for vectors."""
        distance_RM, valid_RM = grouped(distance, seen, self.group)
        logits_RM = minus_largest(-distance_RM, valid_RM) / self.temperature
        return softmax_weights(logits_RM, valid_RM).view_as(distance)
