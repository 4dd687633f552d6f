"""Fixed inputs for tests of distances, among them those of published values, and distances built for them."""

import numpy as np
import torch
from torch import nn

from fmdistill.distill.distances import DISTANCES
from fmdistill.distill.seen import Seen
from fmdistill.registry import bind, complete


def ramp(shape: tuple[int, ...], a: float, b: float, scale: float = 1.0) -> torch.Tensor:
    """Return scale sin(a k + b) cos(0.013 k^2 + b), k = 0, 1, ... in C order, computed in float64, as float32."""
    k = np.arange(np.prod(shape), dtype=np.float64)
    values = scale * np.sin(a * k + b) * np.cos(0.013 * k * k + b)
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


LOGITS = ramp((8, 10), 0.37, 0.1, 3), ramp((8, 10), 0.53, 0.7, 4)  # student's, teacher's; the same below
LABEL = torch.arange(8) % 10
FEATURES = ramp((8, 16), 0.29, 0.2), ramp((8, 16), 0.41, 1.1)
MAPS = ramp((8, 6, 8, 8), 0.17, 0.3), ramp((8, 12, 4, 4), 0.23, 0.9)
LOG_VARIANCE = ramp((8, 16), 0.61, 0.4, 0.5)


def compared(student: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor | None = None, **more) -> Seen:
    """Return the input of a term that compares `student` with `teacher`."""
    return Seen({"student.embedding": student, "sam.embedding": teacher}, output="embedding", label=label, **more)


def double(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pair in float64, so that only the formulas can differ."""
    return pair[0].double(), pair[1].double()


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return standard normal float64 tensors of these shapes from a fixed seed."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def made(name: str, arguments: dict, student: tuple, teacher: tuple) -> nn.Module:
    """Return the distance `name` for outputs of these shapes, in float64, its parameters from a fixed seed."""
    torch.manual_seed(0)
    shapes = {"student": student, "teacher": teacher}
    return complete(bind({"name": name, **arguments}, DISTANCES, "distance", shapes), shapes, "distance").double()
