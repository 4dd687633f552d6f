"""Measurements of speed, each compared with a reference."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fmdistill.backbones.throughput import take_turns


@dataclass(frozen=True)
class Measurement:
    """A measured figure of `what`, and the figure `other` of `against`, its reference, in the same unit."""

    what: str
    figure: float
    unit: str
    against: str = ""
    other: float | None = None

    @property
    def ratio(self) -> float | None:
        """The figure divided by the reference's, None without a reference or if it is zero."""
        return self.figure / self.other if self.other else None


def rates(works: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, amount: float) -> dict[str, float]:
    """Measure the speed of each function, `amount` per second, from the fastest of several rounds in turns."""
    return {name: amount / seconds for name, seconds in take_turns(works, device, rounds).items()}
