"""The state of a training run that a checkpoint stores: task, optimizer, moving average, and skipped steps."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmdistill.distill import checkpoint
from fmdistill.distill.checkpoint import AVERAGE, OPTIMIZER, TASK, Contents
from fmdistill.distill.ema import MovingAverage
from fmdistill.distill.guards import FiniteSteps
from fmdistill.recipe import Train


@dataclass
class TrainingState:
    """All that a checkpoint stores, but for the step."""

    task: nn.Module
    optimizer: torch.optim.Optimizer
    finite: FiniteSteps
    average: MovingAverage | None

    @classmethod
    def begin(
        cls, task: nn.Module, optimizer: torch.optim.Optimizer, settings: Train, first_process: bool = True
    ) -> "TrainingState":
        """Return the state at the beginning of a run."""
        average = None if settings.ema is None else MovingAverage(task, settings.ema)
        return cls(task, optimizer, FiniteSteps(task, optimizer, settings.max_skipped, first_process), average)

    def update(self, step: int, norm: Tensor) -> None:
        """Do the optimizer step and move the average, unless the gradient's norm is not finite."""
        finite = self.finite.step(step, norm)
        if self.average is not None:
            self.average.update(step + 1, finite)
        self.optimizer.zero_grad(set_to_none=True)

    def averaged(self) -> AbstractContextManager[Any]:
        """Return a context in which the task has the average as its parameters, if the run has one."""
        return nullcontext() if self.average is None else self.average.in_use()

    def finish(self, steps: int) -> None:
        """Give the task the average for good. Raises UserError if all steps of the run were skipped."""
        self.finite.check_any(steps)
        if self.average is not None:
            self.average.swap()

    def contents(self) -> Contents:
        """Return what a checkpoint stores."""
        tensors = {TASK: self.task.state_dict(), OPTIMIZER: checkpoint.flat_state(self.optimizer)}
        if self.average is not None:
            tensors[AVERAGE] = self.average.state_dict()
        return Contents(tensors, {"skipped": self.finite.skipped, "skipped_in_a_row": self.finite.in_a_row})

    def load(self, contents: Contents) -> None:
        """Restore `contents`. Raises RuntimeError, ValueError or KeyError if they are of another task or optimizer."""
        tensors, state = contents
        self.task.load_state_dict(tensors[TASK])
        checkpoint.restore(self.optimizer, tensors[OPTIMIZER])
        if self.average is not None:
            self.average.load_state_dict(tensors[AVERAGE])
        # Older checkpoints have neither.
        self.finite.skipped, self.finite.in_a_row = state.get("skipped", 0), state.get("skipped_in_a_row", 0)
