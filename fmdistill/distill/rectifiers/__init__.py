"""Rectifiers: what a teacher says, set right before the student is compared with it. No gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fmdistill.distill.seen import Seen

__all__ = ["RECTIFIERS", "Priors", "Rectifier"]


@dataclass(frozen=True)
class Priors:
    """What is known of the classes before training: `counts` (K,) are the training images of each class.

    `means(output)` gives the teacher's mean `output` of each class over the training images, (K, D).
    """

    counts: Tensor
    means: Callable[[str], Tensor]


class Rectifier(Protocol):
    """Rewrites the teacher's output that a term compares."""

    def __call__(self, seen: Seen) -> Seen:
        """Return what was seen, with the teacher's `seen.output` set right, of the same shape."""
        ...


RECTIFIERS: dict[str, Callable[..., Rectifier]] = {}
