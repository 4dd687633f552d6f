"""Weights that fall with a power of the distance."""

# Legend: B images, N patches per image, R groups of M entries.

from dataclasses import dataclass

from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import Group, check_group, grouped, softmax_weights
from fmdistill.registry import UserError


@dataclass(frozen=True)
class SoftPoly:
    """w_i = (1 + d_i)^-alpha / sum_j (1 + d_j)^-alpha: larger distances count less.

    (Zhang et al., "Prime-Aware Adaptive Distillation", ECCV 2020, Eq. 4.) The weights are multiplied by the number of
    entries, for a mean of one: the paper's sum to one, and its loss divides by that number again. That d is the term's
    distance, without gradient, is our reconstruction; distances below zero, which PAD can have, count as zero.
    """

    alpha: float = 1.0
    group: Group | None = None  # None = image for maps, batch for vectors

    def __post_init__(self) -> None:
        check_group(self.group)
        if not self.alpha > 0:
            raise UserError(f"weighting.alpha={self.alpha}: expected a number above 0")

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights of the shape of the distance, (B, N) for maps of N patches or (B,) for vectors."""
        distance_RM, valid_RM = grouped(distance, seen, self.group)
        return softmax_weights(-self.alpha * distance_RM.clamp_min(0).log1p(), valid_RM).view_as(distance)
