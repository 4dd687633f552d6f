"""Weights that rise exponentially with the distance."""

# Legend: B images, N patches an image, R groups of M entries.

from dataclasses import dataclass

from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import Group
from fmdistill.distill.weightings.soft_exp import SoftExp


@dataclass(frozen=True)
class HardMining:
    """w_i = exp(d_i / temperature) / sum_j exp(d_j / temperature): what the student finds hard counts more.

    A baseline of Zhang et al., "Prime-Aware Adaptive Distillation", ECCV 2020, who only say "larger weights for large
    gaps": this form is our reconstruction, their Eq. 3 (`SoftExp`) with its sign flipped. Here times their count, for a
    mean of one.
    """

    temperature: float = 1.0  # in units of the distance
    group: Group | None = None  # None = image for maps, batch for vectors

    def __post_init__(self) -> None:
        SoftExp(self.temperature, self.group)  # checks both

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return (B, N) weights for the (B, N) distance of N patches, or (B,) for (B,)."""
        return SoftExp(self.temperature, self.group)(-distance, seen)
