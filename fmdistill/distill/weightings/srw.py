"""Sample-wise re-weighting (SRW)."""

# Legend: B images, N patches an image, C or D channels, G images of the optimizer step.

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


@dataclass(frozen=True)
class SRW:
    """Weigh a sample or patch the more, the less similar it is to its group in the teacher's embedding.

    w_i = exp(-s_i / temperature) / sum_j exp(-s_j / temperature), s_i the mean cosine to all of the group, itself
    included; here times their count, for a mean of one. (Yu et al., "Knowledge Distillation Dealing with Sample-wise
    Long-tail Problem", ACCV 2024, Eq. 4 to 6.)

    The group is, as in the paper, the valid patches of an "image" for SAM and the images of a batch for CLIP. The paper
    leaves open whether that is what one device sees ("batch", which includes the patches of a map) or the whole batch
    of the optimizer step ("global_batch", so that weights depend neither on the processes nor on the accumulation),
    and its temperatures for SAM and CLIP; it searched 0.5 to 1. Outside of training "global_batch" is the batch.
    """

    temperature: float = 1.0
    feature: str | None = None  # teacher output whose geometry weighs; None = the output that the term compares
    group: Literal["image", "batch", "global_batch"] | None = None  # None = image for maps, global_batch for vectors

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"weighting.temperature={self.temperature}: expected a number above 0")

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return (B, N) weights for the (B, N) distance of N patches, or (B,) for (B,)."""
        name = self.feature or seen.output
        feature, patches = seen.teacher(name), distance.dim() == 2
        group = self.group or ("image" if patches else "global_batch")
        self._check(group, name, seen.output, patches, feature.dim() == 4)
        if not patches:
            whole_GD = seen.whole_teacher(name) if group == "global_batch" else feature
            return sample_weights(feature, whole_GD, self.temperature)
        assert seen.valid is not None
        feature_BCN = feature.flatten(2)
        if group == "image":
            return patch_weights(feature_BCN, seen.valid, self.temperature)
        joined_1CN, valid_1N = feature_BCN.transpose(0, 1).flatten(1)[None], seen.valid.flatten()[None]
        return patch_weights(joined_1CN, valid_1N, self.temperature).view_as(distance)

    @staticmethod
    def _check(group: str, feature: str, output: str, patches: bool, map_feature: bool) -> None:
        kinds = {True: "one vector per patch", False: "one vector per image"}
        if patches != map_feature:
            raise UserError(
                f"weighting.feature={feature}: has {kinds[map_feature]}, output={output} {kinds[patches]}; "
                f"weigh by a feature of the output's kind"
            )
        if not patches and group == "image":
            raise UserError(
                f"weighting.group=image: output={output} has {kinds[False]}, so nothing to weigh within an image; "
                f"use global_batch or batch"
            )
        if patches and group == "global_batch":
            raise UserError(
                f"weighting.group=global_batch: output={output} has {kinds[True]}, and patches are not exchanged "
                f"between processes; use image or batch"
            )


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


@torch.no_grad()
def sample_weights(feature: Tensor, whole: Tensor, temperature: float) -> Tensor:
    """Return SRW's weights (B,) of (B, D) features among the group `whole` (G, D), whose own have mean one."""
    mean_D = F.normalize(whole.float(), dim=1).mean(0)
    logits_B, logits_G = (-(F.normalize(f.float(), dim=1) @ mean_D) / temperature for f in (feature, whole))
    return (logits_B - logits_G.logsumexp(0) + math.log(len(whole))).exp()
