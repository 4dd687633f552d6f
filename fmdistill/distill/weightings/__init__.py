"""Weightings: how much each sample or patch counts.

Weights carry no gradient, are zero for invalid patches and have mean one, unless a weighting documents another mean.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.by_key import ByKey
from fmdistill.distill.weightings.hard_discarding import HardDiscarding
from fmdistill.distill.weightings.hard_mining import HardMining
from fmdistill.distill.weightings.ipwd import IPWD
from fmdistill.distill.weightings.masks import HardMask, MaskArea
from fmdistill.distill.weightings.region_balance import RegionBalance
from fmdistill.distill.weightings.regional_srw import RegionalSRW
from fmdistill.distill.weightings.soft_exp import SoftExp
from fmdistill.distill.weightings.soft_poly import SoftPoly
from fmdistill.distill.weightings.srw import SRW
from fmdistill.distill.weightings.sum_normalizer import SumNormalizer
from fmdistill.distill.weightings.uniform import Uniform
from fmdistill.distill.weightings.wsld import WSLD

__all__ = ["WEIGHTINGS", "Learned", "Weighting"]


class Weighting(Protocol):
    """Computes a weight for each entry of a distance."""

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights of the shape of the detached `distance`, (B,) or (B, N)."""
        ...


@runtime_checkable
class Learned(Protocol):
    """A weighting with learned parameters (an nn.Module), trained by a loss that is added to the term's."""

    def auxiliary(self, seen: Seen) -> Tensor:
        """Return the weighting's own loss (B,), which neither weights nor the term's scale multiply."""
        ...


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "uniform": Uniform,
    "srw": SRW,
    "regional_srw": RegionalSRW,
    "region_balance": RegionBalance,
    "sum_normalizer": SumNormalizer,
    "soft_exp": SoftExp,
    "soft_poly": SoftPoly,
    "hard_mining": HardMining,
    "hard_discarding": HardDiscarding,
    "wsld": WSLD,
    "ipwd": IPWD,
    "by_key": ByKey,
    "hard_mask": HardMask,
    "mask_area": MaskArea,
}
