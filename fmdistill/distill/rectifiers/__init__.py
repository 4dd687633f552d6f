"""Rectifiers: correct the teacher's output before the student is compared with it, without gradient."""

from collections.abc import Callable
from typing import Protocol

from fmdistill.distill.rectifiers.krd_logits import KRDLogits
from fmdistill.distill.rectifiers.krd_representation import KRDRepresentation
from fmdistill.distill.rectifiers.priors import Priors
from fmdistill.distill.rectifiers.probability_mix import ProbabilityMix
from fmdistill.distill.rectifiers.probability_swap import ProbabilitySwap
from fmdistill.distill.seen import Seen

__all__ = ["RECTIFIERS", "Priors", "Rectifier"]


class Rectifier(Protocol):
    """Corrects the teacher's output that a term compares."""

    def __call__(self, seen: Seen) -> Seen:
        """Return `seen` with the teacher's output named `seen.output` corrected, of the same shape."""
        ...


RECTIFIERS: dict[str, Callable[..., Rectifier]] = {
    "krd_representation": KRDRepresentation,
    "krd_logits": KRDLogits,
    "probability_swap": ProbabilitySwap,
    "probability_mix": ProbabilityMix,
}
