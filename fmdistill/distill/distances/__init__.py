"""Distances between a student's output and the teacher's, never reduced over samples or patches."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from fmdistill.distill.distances.cosine import Cosine
from fmdistill.distill.distances.mse import MSE

__all__ = ["DISTANCES", "Distance"]


class Distance(Protocol):
    """Measures how far the student is from the teacher, both in float32 or better."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Map (B, C) vectors to (B,), or (B, C, H, W) maps to (B, H W)."""
        ...


DISTANCES: dict[str, Callable[..., Distance]] = {"mse": MSE, "cosine": Cosine}
