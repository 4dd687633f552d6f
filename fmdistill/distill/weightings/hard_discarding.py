"""No weight for the largest distances."""

# Legend: B images, N patches an image, R groups of M entries.

from dataclasses import dataclass

import torch
from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import Group, grouped, mean_one, refuse_global_batch
from fmdistill.registry import UserError


@dataclass(frozen=True)
class HardDiscarding:
    """Weight zero for the `fraction` of a group that the student finds hardest, one and the same for the others.

    A baseline of Zhang et al., "Prime-Aware Adaptive Distillation", ECCV 2020, who drop "the largest in each batch" and
    give no fraction: its default is a guess. As many are dropped as the nearest whole number, never all, and none of
    several that are equally large unless all of these fit. The mean is one, so the others weigh more than one.
    """

    fraction: float = 0.1
    group: Group | None = None  # None = image for maps, batch for vectors

    def __post_init__(self) -> None:
        refuse_global_batch(self.group)
        if not 0 <= self.fraction < 1:
            raise UserError(f"weighting.fraction={self.fraction}: expected a share of the group, from 0 to below 1")

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return (B, N) weights for the (B, N) distance of N patches, or (B,) for (B,)."""
        distance_RM, valid_RM = grouped(distance, seen, self.group)
        count_R1 = valid_RM.sum(1, keepdim=True)
        kept_R1 = (count_R1 - (count_R1 * self.fraction).round().long()).clamp_min(1)
        sorted_RM = distance_RM.masked_fill(~valid_RM, torch.inf).sort(1).values
        kept_RM = distance_RM <= sorted_RM.gather(1, kept_R1 - 1)
        return mean_one(kept_RM.to(distance.dtype), valid_RM).view_as(distance)
