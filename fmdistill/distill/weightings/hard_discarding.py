"""Weight zero for the largest distances."""

# Legend: B images, N patches per image, R groups of M entries.

from dataclasses import dataclass

import torch
from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import Group, check_group, grouped, mean_one
from fmdistill.registry import UserError


@dataclass(frozen=True)
class HardDiscarding:
    """Gives weight zero to the `fraction` of a group with the largest distances, and equal weights to the others.

    A baseline of Zhang et al., "Prime-Aware Adaptive Distillation", ECCV 2020, who drop "the largest in each batch"
    without stating a fraction: the default is a guess. The number dropped is rounded to the nearest integer and never
    all of a group; equal distances are dropped together or not at all. The mean is one, so the others weigh more.
    """

    fraction: float = 0.1
    group: Group | None = None  # None = image for maps, batch for vectors

    def __post_init__(self) -> None:
        check_group(self.group)
        if not 0 <= self.fraction < 1:
            raise UserError(f"weighting.fraction={self.fraction}: expected a fraction of at least 0 and below 1")

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights of the shape of the distance, (B, N) for maps of N patches or (B,) for vectors."""
        distance_RM, valid_RM = grouped(distance, seen, self.group)
        count_R1 = valid_RM.sum(1, keepdim=True)
        remaining_R1 = (count_R1 - (count_R1 * self.fraction).round().long()).clamp_min(1)
        sorted_RM = distance_RM.masked_fill(~valid_RM, torch.inf).sort(1).values
        remains_RM = distance_RM <= sorted_RM.gather(1, remaining_R1 - 1)
        return mean_one(remains_RM.to(distance.dtype), valid_RM).view_as(distance)
