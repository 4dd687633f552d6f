"""Weightings: how much each sample or patch counts. No gradient, zero where not valid, mean one over the valid ones."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.srw import SRW
from fmdistill.distill.weightings.uniform import Uniform

__all__ = ["WEIGHTINGS", "Weighting"]


class Weighting(Protocol):
    """Weighs the entries of a distance."""

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Map the detached distance, (B,) or (B, N), and all that was seen to weights of the same shape."""
        ...


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {"uniform": Uniform, "srw": SRW}
