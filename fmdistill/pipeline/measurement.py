"""Measure how much work is done in a second, beside what it is compared with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fmdistill.backbones.throughput import take_turns


@dataclass(frozen=True)
class Measurement:
    """One measured figure, and that of what it is compared with, in the same unit."""

    what: str
    figure: float
    unit: str
    against: str = ""
    other: float | None = None

    @property
    def ratio(self) -> float | None:
        """Return the figure over the other's."""
        return None if self.other is None else self.figure / self.other


def rates(works: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, amount: float) -> dict[str, float]:
    """Return how much of `amount` each of `works` does in a second, at its best of several rounds in turns."""
    return {name: amount / seconds for name, seconds in take_turns(works, device, rounds).items()}
