"""SRW's ablation "SumNormalizer": weights proportional to a sample's or patch's dissimilarity to its group."""

# Legend: B images, N patches per image, R groups of M entries.

from dataclasses import dataclass

import torch
from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import Group, mean_one
from fmdistill.distill.weightings.similarity import ROUNDING, similarities


@dataclass(frozen=True)
class SumNormalizer:
    """w_i = (x_i - min x) / sum_j (x_j - min x), multiplied by the number of entries, for a mean of one.

    (Yu et al., "Knowledge Distillation Dealing with Sample-wise Long-tail Problem", ACCV 2024, Eq. 7.) The paper does
    not say what x is: x_i = -s_i, with s_i the mean cosine of `SRW`, is our reconstruction, the only reading that
    favours rare entries. The most typical entry gets weight zero; if all are equally similar, each gets one. Groups and
    `feature` are those of `SRW`.
    """

    feature: str | None = None  # teacher output whose similarities are used; None = the output that the term compares
    group: Group | None = None  # None = image for maps, global_batch for vectors

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights of the shape of the distance, (B, N) for maps of N patches or (B,) for vectors."""
        similarity_RM, valid_RM, own_RM = similarities(distance, seen, self.feature, self.group)
        largest_R1 = similarity_RM.masked_fill(~valid_RM, -torch.inf).amax(1, keepdim=True)
        unlike_RM = (largest_R1 - similarity_RM).masked_fill(~valid_RM, 0)
        alike_R1 = unlike_RM.amax(1, keepdim=True) <= ROUNDING
        own_RM = own_RM if own_RM is None else (largest_R1 - own_RM).clamp_min(0)
        return mean_one(unlike_RM.masked_fill(alike_R1, 0), valid_RM, own_RM).view_as(distance)
