"""Guards of a training run that nobody watches: steps that are not finite, and a student that does not move."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmdistill.distill.engine import Delayed
from fmdistill.distill.optim import LearningRates
from fmdistill.logs import log
from fmdistill.recipe import VALIDATION
from fmdistill.registry import UserError, suggest

MOVED_BY = 100  # steps after which a student must have moved
LEAST = 1e-9  # of its parameters' norm
NAMED = 4  # keys of images that a message names

LARGEST = (f"{VALIDATION}accuracy",)  # values of `train.best` of which the largest is the best; of others the smallest
WAYS_OUT = "lower optimizer.lr, set train.clip=1 or train.precision=fp32, or take such images out"


class FiniteSteps:
    """Skips each optimizer step whose loss or gradient is not finite, counts them, and ends the run if they go on.

    A skipped step changes neither the parameters, nor the optimizer's state, nor a buffer such as BatchNorm's
    statistics. All processes skip the same steps: a loss that is not finite makes its gradients so (`scaled`), and
    these are averaged over the processes.

    With a fused optimizer, which AdamW and SGD are on a GPU, the GPU itself decides, and the program counts the step
    during the next one, without waiting. With any other optimizer it waits for the gradient's norm.
    """

    def __init__(self, task: nn.Module, optimizer: torch.optim.Optimizer, limit: int, first: bool = True) -> None:
        self.optimizer, self.limit, self._first = optimizer, limit, first  # whether this is the first process
        self.skipped = self.in_a_row = 0  # steps
        self.fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))  # as PyTorch's GradScaler asks
        stored, grouped = task.state_dict().keys(), {}
        for name, buffer in task.named_buffers():
            if name in stored:
                grouped.setdefault(buffer.dtype, []).append(buffer)
        self._buffers: list[list[Tensor]] = list(grouped.values())
        self._before: list[Tensor] = []
        self._parts: list[tuple[list[str], Tensor]] = []
        self._steps: deque[tuple[int, list[tuple[list[str], Tensor]]]] = deque()
        self._delayed = Delayed()

    def begin(self) -> None:
        """Remember the buffers at the beginning of a step."""
        self._before, self._parts = [_joined(buffers) for buffers in self._buffers], []

    def scaled(self, loss: Tensor, keys: list[str], accumulate: int) -> Tensor:
        """Return the loss of a micro-batch to differentiate; its gradients are NaN if the loss is not finite."""
        self._parts.append((keys, loss.detach()))
        return loss / accumulate * torch.where(loss.detach().isfinite(), 1.0, math.nan)

    def step(self, step: int, norm: Tensor) -> Tensor:
        """Do the optimizer step unless the gradient's norm is not finite; return whether it is, a bool tensor ()."""
        finite = norm.isfinite()
        self._steps.append((step, self._parts))
        if self.fused and self.optimizer.state:  # a first step makes the state, and SGD's only if it is not skipped
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
            self._restore_unless(finite)
            self._count(self._delayed.exchange(finite))
            return finite
        self.settle()
        if finite:
            self.optimizer.step()
        else:
            self._restore_unless(finite)
        self._count(finite)
        return finite

    def undo(self) -> None:
        """Give the buffers the values of the beginning of the step."""
        self._restore_unless(torch.tensor(False, device=self._before[0].device if self._before else None))

    def check_any(self, steps: int) -> None:
        """Raise a UserError if all `steps` of a run were skipped."""
        self.settle()
        if self.skipped == steps:
            raise UserError(
                f"all {steps} steps were skipped, since the loss or the gradient was not finite; {WAYS_OUT}"
            )

    def settle(self) -> None:
        """Count the step that is not counted yet, waiting for the GPU."""
        self._count(self._delayed.last())

    @torch.no_grad()
    def _restore_unless(self, finite: Tensor) -> None:
        for buffers, before in zip(self._buffers, self._before, strict=True):
            values = torch.where(finite, _joined(buffers), before).split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [v.view_as(b) for v, b in zip(values, buffers, strict=True)])  # type: ignore

    def _count(self, finite: Tensor | None) -> None:
        if finite is None:
            return
        step, parts = self._steps.popleft()
        if finite:
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        spoiled = [(keys, loss) for keys, loss in parts if not loss.isfinite()]
        reason = f"the loss is {float(spoiled[0][1])}" if spoiled else "the gradient is not finite"
        reason = f"{reason} for {_listed([key for keys, _ in spoiled or parts for key in keys])}"
        if self.in_a_row >= self.limit:
            raise UserError(
                f"step {step + 1}: {self.in_a_row} steps in a row were skipped (train.max_skipped={self.limit}), the "
                f"last since {reason}; {WAYS_OUT}"
            )
        if self.in_a_row == 1 and (self._first or spoiled):  # other processes know of no reason
            log.warning("step %d is skipped: %s; %d skipped so far", step + 1, reason, self.skipped)


def _joined(buffers: Sequence[Tensor]) -> Tensor:
    return torch.cat([buffer.reshape(-1) for buffer in buffers])


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return f"image{'s' * (len(keys) > 1)} {', '.join(keys[:NAMED])}{more}"


def check_first_step(step: int, task: nn.Module, losses: Mapping[str, Tensor], norm: Tensor, best: str | None) -> None:
    """Raise a UserError if in step 0 nothing is compared, some parameters get no gradient, or `best` is no loss."""
    if step > 0:
        return
    if float(losses["loss"]) == 0:
        raise UserError("step 1: the loss is exactly zero: the objective compares nothing, or every weight is zero")
    without = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    if without or float(norm) == 0:
        parameters = f"{len(without)} parameters, {without[0]} first" if without else "any parameter"
        raise UserError(f"step 1: no gradient reaches {parameters}; the student's output is cut off from the loss")
    known = {f"{VALIDATION}{name}" for name in losses} | set(LARGEST)
    if best is not None and best not in known:
        raise UserError(f"train.best={best}: no such value.{suggest(best, known)}")


class Movement:
    """Compares the trained parameters with those that the run began with, after `MOVED_BY` steps."""

    def __init__(self, task: nn.Module, steps: int) -> None:
        self._trained = [p for p in task.parameters() if p.requires_grad] if steps >= MOVED_BY else []
        self._initial = [p.detach().to("cpu", copy=True) for p in self._trained]
        self._frozen = sum(not p.requires_grad for p in task.parameters())

    @torch.no_grad()
    def check(self, done: int, rates: LearningRates, finite: FiniteSteps) -> None:
        """Raise a UserError if they have not moved after so many steps."""
        if done != MOVED_BY or not self._trained:
            return
        finite.settle()
        moved = _norm(p.cpu().double() - initial for p, initial in zip(self._trained, self._initial, strict=True))
        change = moved / max(_norm(p.double() for p in self._initial), 1e-30)
        if change < LEAST:
            raise UserError(
                f"step {done}: the student has not moved: its parameters changed by a relative {change:.1g}. The "
                f"largest learning rate so far was {rates.largest(done):.3g}, {finite.skipped} steps were skipped, and "
                f"{self._frozen} of {len(self._trained) + self._frozen} tensors of parameters are frozen; raise "
                f"optimizer.lr, shorten schedule.warmup, or freeze fewer"
            )
        self._initial = []


def _norm(values: Iterable[Any]) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in values))
