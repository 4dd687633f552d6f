"""Sample-wise re-weighting (SRW) within the regions of an image."""

# Legend: B images, C channels, N patches per image, R regions of an image.

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import softmax_weights
from fmdistill.distill.weightings.regions import check_regions, teacher_regions
from fmdistill.registry import UserError


@dataclass(frozen=True)
class RegionalSRW:
    """Weighs a patch more, the less similar it is to its own region of the image in the teacher's embedding.

    w_i = |R_i| exp(-s_i / temperature) / sum_{j in R_i} exp(-s_j / temperature), with R_i the region of patch i and s_i
    its mean cosine to the patches of R_i, itself included: SRW (Yu et al., ACCV 2024, Eq. 4 to 6) with regions as its
    groups. Ours, to compensate: over a whole image, SRW's weight of small objects comes out of large regions, and large
    masks lose. Here each region keeps the total that uniform weights give it, and its unusual patches, such as small
    objects and edges, take their weight from their own surroundings. Regions: `regions` anchors by farthest-point
    sampling.
    """

    needs_patches: ClassVar[bool] = True

    temperature: float = 1.0
    regions: int = 8  # anchors per image; an image of fewer different patches has fewer
    feature: str | None = None  # teacher output that divides and weighs; None = the output that the term compares

    def __post_init__(self) -> None:
        check_regions(self.regions)
        if not self.temperature > 0:
            raise UserError(f"weighting.temperature={self.temperature}: expected a number above 0")

    @torch.no_grad()
    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights (B, N), with mean one over the valid patches of each region. UserError for a distance (B,)."""
        unit_BCN, member_BRN = teacher_regions(distance, seen, self.feature, self.regions)
        share_BRN = member_BRN / member_BRN.sum(2, keepdim=True).clamp_min(1)
        mean_BRC = torch.bmm(share_BRN, unit_BCN.transpose(1, 2))
        logits_BRN = torch.bmm(mean_BRC, unit_BCN) / -self.temperature  # of each patch in each region
        weight_BRN = softmax_weights(logits_BRN.flatten(0, 1), member_BRN.flatten(0, 1)).view_as(member_BRN)
        return weight_BRN.sum(1)
