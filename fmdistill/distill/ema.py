"""The exponential moving average of the weights, which a run with `train.ema` validates and leaves as its student."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """The exponential moving average of a task's trained parameters; buffers, such as BatchNorm's, are the task's own.

    After step t (from 1) the average moves by 1 - d_t towards the parameters, d_t = min(decay, (1 + t) / (10 + t)), so
    that a short run's average does not consist of the weights that it began with (TensorFlow's rule).
    """

    def __init__(self, task: nn.Module, decay: float) -> None:
        self.task, self.decay = task, decay
        self._parameters = [p for p in task.parameters() if p.requires_grad]
        self._averages = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, step: int, done: Tensor) -> None:
        """Move the averages after optimizer step `step` (from 1), unless `done` (a bool tensor) is false."""
        weight = torch.where(done, 1 - min(self.decay, (1 + step) / (10 + step)), 0.0)
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.lerp_(parameter, weight.to(average.dtype))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the task the averages as its parameters within the context."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange the task's parameters and the averages."""
        for index, parameter in enumerate(self._parameters):
            parameter.data, self._averages[index] = self._averages[index], parameter.data

    def state_dict(self) -> dict[str, Tensor]:
        """Return the task's state with the averages as its parameters."""
        averages = {id(p): average for p, average in zip(self._parameters, self._averages, strict=True)}
        stored: Mapping[str, Tensor] = self.task.state_dict(keep_vars=True)
        return {name: averages[id(value)] if id(value) in averages else value for name, value in stored.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the averages from a `state_dict`."""
        for name, average in self.state_dict().items():
            average.data.copy_(state[name])
