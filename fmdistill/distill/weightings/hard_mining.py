"""Weights that rise exponentially with the distance."""

# Legend: B images, N patches per image, R groups of M entries.

from dataclasses import dataclass

from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import Group
from fmdistill.distill.weightings.soft_exp import SoftExp


@dataclass(frozen=True)
class HardMining:
    """w_i = exp(d_i / temperature) / sum_j exp(d_j / temperature): larger distances count more.

    A baseline of Zhang et al., "Prime-Aware Adaptive Distillation", ECCV 2020, who only say "larger weights for large
    gaps": this form, their Eq. 3 (`SoftExp`) with its sign flipped, is our reconstruction. The weights are multiplied
    by the number of entries, for a mean of one.
    """

    temperature: float = 1.0  # in units of the distance
    group: Group | None = None  # None = image for maps, batch for vectors

    def __post_init__(self) -> None:
        SoftExp(self.temperature, self.group)  # checks both

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights of the shape of the distance, (B, N) for maps of N patches or (B,) for vectors."""
        return SoftExp(self.temperature, self.group)(-distance, seen)
