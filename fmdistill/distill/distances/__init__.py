"""Distances between a student's output and the teacher's, never reduced over samples or patches."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from fmdistill.distill.distances.affinity import Affinity
from fmdistill.distill.distances.at import AT
from fmdistill.distill.distances.balanced import Balanced
from fmdistill.distill.distances.cc import CC
from fmdistill.distill.distances.contrastive import ContrastiveDistance
from fmdistill.distill.distances.cosine import CosineDistance
from fmdistill.distill.distances.crd import CRD
from fmdistill.distill.distances.cross_entropy import CrossEntropy
from fmdistill.distill.distances.dkd import DKD
from fmdistill.distill.distances.fitnet import FitNet
from fmdistill.distill.distances.icl import ICL
from fmdistill.distill.distances.kd import KD
from fmdistill.distill.distances.mask import Mask, MaskChoice, MaskPatches
from fmdistill.distill.distances.mse import MSE
from fmdistill.distill.distances.pad import PAD
from fmdistill.distill.distances.pkt import PKT
from fmdistill.distill.distances.rkd import RKD
from fmdistill.distill.distances.sp import SP
from fmdistill.distill.distances.token_similarity import TokenSimilarity
from fmdistill.distill.distances.vid import VID
from fmdistill.distill.seen import Seen

__all__ = ["DISTANCES", "Distance"]


class Distance(Protocol):
    """Measures how far the student's output named `seen.output` is from the teacher's, or from the label.

    It is a frozen dataclass, or an nn.Module if it learns. Its constructor may take the arguments `student` and
    `teacher`, the shapes of the outputs of one image that it compares; `shapes`, those of all outputs by name; and
    `logit_scale`, the factor of a teacher's cosines between images and texts.

    Two attributes are optional. With `over_step` true, `seen` holds the vectors of all images of the optimizer step,
    over processes and accumulation, and the distance returns a value for each of them. `needs_captions` is true if it
    compares images with the embeddings of their captions.
    """

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors, or (B, H W) for maps (B, C, H, W)."""
        ...


DISTANCES: dict[str, Callable[..., Distance]] = {
    "cross_entropy": CrossEntropy,
    "kd": KD,
    "dkd": DKD,
    "mse": MSE,
    "cosine": CosineDistance,
    "balanced": Balanced,
    "fitnet": FitNet,
    "at": AT,
    "rkd": RKD,
    "sp": SP,
    "pkt": PKT,
    "token_similarity": TokenSimilarity,
    "cc": CC,
    "vid": VID,
    "pad": PAD,
    "affinity": Affinity,
    "icl": ICL,
    "crd": CRD,
    "contrastive": ContrastiveDistance,
    "mask": Mask,
    "mask_patches": MaskPatches,
    "mask_choice": MaskChoice,
}
