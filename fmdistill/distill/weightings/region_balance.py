"""Weights that make up for the sizes of an image's regions."""

# Legend: B images, N patches per image, R regions of an image.

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import mean_one
from fmdistill.distill.weightings.regions import check_regions, teacher_regions
from fmdistill.registry import UserError


@dataclass(frozen=True)
class RegionBalance:
    """Weighs a patch less, the larger its region of the image is.

    w_i = |R_i|^-power / mean_j |R_j|^-power over the image, with |R_i| the number of patches in the region of patch i.
    A region's total goes as |R|^(1 - power): 0 gives uniform weights, 1 the same total to every region, and 0.5 is in
    between. Ours: plain MSE counts an object by its area, so that a background of half of the image decides half of the
    loss. Unlike SRW, a large region of unusual patches does not gain. Regions are those of `RegionalSRW`.
    """

    needs_patches: ClassVar[bool] = True

    power: float = 0.5  # from 0, uniform, to 1, every region counts the same
    regions: int = 8  # anchors per image; an image of fewer different patches has fewer
    feature: str | None = None  # teacher output that divides; None = the output that the term compares

    def __post_init__(self) -> None:
        check_regions(self.regions)
        if not 0 <= self.power <= 1:
            raise UserError(f"weighting.power={self.power}: expected a number from 0 to 1")

    @torch.no_grad()
    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights (B, N), with mean one over an image's valid patches. Raises UserError for a distance (B,)."""
        _, member_BRN = teacher_regions(distance, seen, self.feature, self.regions)
        size_BR1 = member_BRN.sum(2, keepdim=True).clamp_min(1)
        raw_BN = (member_BRN * size_BR1.float() ** -self.power).sum(1)
        assert seen.valid is not None
        return mean_one(raw_BN, seen.valid)
