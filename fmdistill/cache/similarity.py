"""Compute SRW's average similarity, and store it beside each map during the teacher pass.

A stored value is rounded by at most 2^-12, so a weight at temperature T is off by a factor of at most exp(2^-11 / T).
With `relative`, T counts in deviations of the similarities, and 2^-12 may be a percent of one.
"""

# Legend: B images, N patches an image, C channels, g patches a side.

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmdistill.cache.captions import TextTeacher, count_of
from fmdistill.cache.outputs import with_similarities
from fmdistill.teachers import refuse_similarity
from fmdistill.teachers.family import Head, Teacher

STEP = 2.0**-11  # the largest distance between neighbours in float16 up to 1, in which similarities are stored


def average_similarity(feature: Tensor, valid: Tensor) -> Tensor:
    """Return each patch's mean cosine to the valid patches of its image, (B, N); SRW's Eq. 4 for (B, C, N) features.

    Uses unit(f_i) . mean_j unit(f_j), which equals the mean over N x N cosines and is linear in N.
    """
    feature_BCN = feature.float()
    inverse_BN = feature_BCN.square().sum(1).clamp_min(1e-24).rsqrt()
    share_BN = inverse_BN * valid / valid.sum(1, keepdim=True).clamp_min(1)
    mean_BC1 = torch.bmm(feature_BCN, share_BN.unsqueeze(2))
    return torch.bmm(mean_BC1.transpose(1, 2), feature_BCN).squeeze(1) * inverse_BN


def kept_similarity(stored: Tensor, valid: Tensor) -> Tensor:
    """Return `average_similarity` (B, N) from the stored (B, 2, g, g), for all patches valid or for the unpadded ones.

    If the values of an image differ by at most one `STEP`, which rounding alone may cause, its patches are taken to be
    equally similar, and the image gets zeros.
    """
    all_BN, unpadded_BN = stored.flatten(2).unbind(1)
    similarity_BN = torch.where(valid.all(1, keepdim=True), all_BN, unpadded_BN)
    largest_B1 = similarity_BN.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    least_B1 = similarity_BN.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    return similarity_BN.masked_fill(largest_B1 - least_B1 <= STEP, 0)


class WithSimilarity:
    """A teacher with an output NAME_similarity (B, 2, g, g) beside each map NAME (B, C, g, g): SRW's mean cosines.

    The first plane has each patch's mean cosine to all patches, the second that of valid patches to the valid ones,
    zero elsewhere.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.outputs = with_similarities(teacher.outputs)
        if self.outputs == teacher.outputs:
            refuse_similarity(type(teacher).__name__, "choose a teacher of maps, or leave `similarity` out")
        self.teacher, self.family, self.preprocess = teacher, teacher.family, teacher.preprocess
        self.batch, self.workers, self.captions = teacher.batch, teacher.workers, count_of(teacher)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Return the teacher's outputs and their similarities, float32 on the CPU."""
        made = self.teacher(pixels, sizes)
        valid_Bgg = self.preprocess.valid(sizes)
        added = {name: output for name, output in self.outputs.items() if output.of is not None}
        for name, output in added.items():
            map_BCgg = made[output.of or ""]
            made[name] = _both(map_BCgg, valid_Bgg if output.tokens == "image" else None)
        return made

    def encode_captions(self, texts: Sequence[str]) -> Tensor:
        """Return the texts' embeddings (N, D) by the teacher's own text tower."""
        assert isinstance(self.teacher, TextTeacher)
        return self.teacher.encode_captions(texts)

    def fingerprint(self) -> dict[str, Any]:
        """Return the teacher's own fingerprint; the manifest's outputs show the similarities."""
        return self.teacher.fingerprint()

    def head(self) -> Head | None:
        """Return the teacher's own head."""
        return self.teacher.head()


def _both(map_BCgg: Tensor, valid_Bgg: Tensor | None) -> Tensor:
    feature_BCN, every_BN = map_BCgg.flatten(2), torch.ones_like(map_BCgg[:, 0], dtype=torch.bool).flatten(1)
    valid_BN = every_BN if valid_Bgg is None else valid_Bgg.flatten(1)
    both = average_similarity(feature_BCN, every_BN), average_similarity(feature_BCN, valid_BN) * valid_BN
    return torch.stack(both, 1).unflatten(2, map_BCgg.shape[2:])
