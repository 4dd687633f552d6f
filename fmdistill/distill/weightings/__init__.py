"""Weightings: how much each sample or patch counts. No gradient, zero where not valid, mean one unless one says not."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.by_key import ByKey
from fmdistill.distill.weightings.hard_discarding import HardDiscarding
from fmdistill.distill.weightings.hard_mining import HardMining
from fmdistill.distill.weightings.ipwd import IPWD
from fmdistill.distill.weightings.soft_exp import SoftExp
from fmdistill.distill.weightings.soft_poly import SoftPoly
from fmdistill.distill.weightings.srw import SRW
from fmdistill.distill.weightings.sum_normalizer import SumNormalizer
from fmdistill.distill.weightings.uniform import Uniform
from fmdistill.distill.weightings.wsld import WSLD

__all__ = ["WEIGHTINGS", "Learned", "Weighting"]


class Weighting(Protocol):
    """Weighs the entries of a distance."""

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Map the detached distance, (B,) or (B, N), and all that was seen to weights of the same shape."""
        ...


@runtime_checkable
class Learned(Protocol):
    """A weighting with parts of its own that learn (an nn.Module), by a loss that is added to the term's."""

    def auxiliary(self, seen: Seen) -> Tensor:
        """Return the parts' own loss, (B,), which no weight multiplies and no scale."""
        ...


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "uniform": Uniform,
    "srw": SRW,
    "sum_normalizer": SumNormalizer,
    "soft_exp": SoftExp,
    "soft_poly": SoftPoly,
    "hard_mining": HardMining,
    "hard_discarding": HardDiscarding,
    "wsld": WSLD,
    "ipwd": IPWD,
    "by_key": ByKey,
}
