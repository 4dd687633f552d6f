"""Weightings: how much each sample or patch counts. No gradient, zero where not valid, mean one over the valid ones."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.srw import SRW
from fmdistill.distill.weightings.uniform import Uniform

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


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {"uniform": Uniform, "srw": SRW}
