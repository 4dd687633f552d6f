"""Sample-wise re-weighting (SRW)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


@dataclass(frozen=True)
class SRW:
    """Weigh a patch the more, the less similar it is to the other patches of its image in the teacher's embedding.

    w_i = exp(-s_i / temperature) / sum_j exp(-s_j / temperature), s_i the mean cosine to all valid patches, itself
    included; here times their count, for a mean of one. (Yu et al., "Knowledge Distillation Dealing with Sample-wise
    Long-tail Problem", ACCV 2024, Eq. 4 to 6, within each image as for SAM; the temperature for SAM is not published.)
    """

    temperature: float = 1.0
    feature: str | None = None  # teacher output whose geometry weighs; None = the output that the term compares

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"weighting.temperature={self.temperature}: expected a number above 0")

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return (B, N) weights for the (B, N) distance of N patches."""
        feature = seen.teacher(self.feature or seen.output)
        if feature.dim() != 4 or distance.dim() != 2:
            raise UserError("weighting.name=srw weighs the patches of an image; this output has no patches")
        return patch_weights(feature.flatten(2), seen.valid, self.temperature)


@torch.no_grad()
def average_similarity(feature: Tensor, valid: Tensor) -> Tensor:
    """Return each patch's mean cosine to the valid patches of its image, (B, N); Eq. 4 for (B, C, N) features.

    Uses unit(f_i) . mean_j unit(f_j), which equals the mean over N x N cosines and is linear in N.
    """
    feature_BCN = feature.float()
    inverse_BN = feature_BCN.square().sum(1).clamp_min(1e-24).rsqrt()
    share_BN = inverse_BN * valid / valid.sum(1, keepdim=True).clamp_min(1)
    mean_BC1 = torch.bmm(feature_BCN, share_BN.unsqueeze(2))
    return torch.bmm(mean_BC1.transpose(1, 2), feature_BCN).squeeze(1) * inverse_BN


@torch.no_grad()
def patch_weights(feature: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Return SRW's weights (B, N), mean one over the valid patches and zero elsewhere, for (B, C, N) features."""
    similarity_BN = average_similarity(feature, valid)
    logits_BN = (-similarity_BN / temperature).masked_fill(~valid, -torch.inf)
    return logits_BN.softmax(1) * valid.sum(1, keepdim=True)
