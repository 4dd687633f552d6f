"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn

from fmdistill.backbones.device import has_bf16
from fmdistill.registry import UserError


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019); one-dimensional parameters (biases and norms) are not decayed.

    With `layer_decay`, for fine-tuning, the rate of a timm backbone's last stage is `lr` times this factor, that of the
    stage before times its square, and so on to the stem (Clark et al. 2020); all other layers have `lr`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    factors = _layer_factors(model, layer_decay)
    groups = [
        {"params": [p for p in trained if factors.get(id(p), 1.0) == factor and (p.dim() > 1) is decays]}
        | {"weight_decay": weight_decay if decays else 0.0, "lr": lr * factor}
        for factor in sorted({1.0, *factors.values()}, reverse=True)
        for decays in (True, False)
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=_fused(trained))


def sgd(model: nn.Module, lr: float, weight_decay: float = 5e-4, momentum: float = 0.9) -> torch.optim.Optimizer:
    """Return SGD with momentum, weight decay for all parameters and no Nesterov, as in the CIFAR-100 tables."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=_fused(trained))


def _layer_factors(model: nn.Module, decay: float) -> dict[int, float]:
    """Return the factor of the learning rate of each parameter of timm's backbones in `model`, by the parameter's id.

    Raises UserError if `decay` is not a factor, or if the model has no backbone whose layers timm knows.
    """
    if not 0 < decay <= 1:
        raise UserError(f"optimizer.layer_decay={decay}: expected a factor above 0, at most 1, such as 0.8")
    if decay == 1:
        return {}
    factors: dict[int, float] = {}
    for backbone in model.modules():
        if callable(matcher := getattr(backbone, "group_matcher", None)):
            stage: dict[str, Any] = group_parameters(backbone, matcher(coarse=True), reverse=True)  # type: ignore
            last = max(stage.values())
            factors |= {id(p): decay ** (last - stage[name] + 1) for name, p in backbone.named_parameters()}
    if not factors:
        raise UserError(
            f"optimizer.layer_decay={decay}: the student has no backbone of timm whose stages are known, as TinyViT "
            f"has; leave it out"
        )
    return factors


def _fused(trained: Sequence[nn.Parameter]) -> bool | None:
    """Return True on a GPU, where a fused optimizer can skip a step by itself; None leaves the choice to PyTorch."""
    return True if trained and trained[0].is_cuda else None


def muon(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    momentum: float = 0.95,
    other_lr: float | None = None,
    convolutions: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """Return Muon (Jordan et al. 2024) with Nesterov momentum for the weights of linear layers, NAdamW for all others.

    With `convolutions`, Muon also takes ungrouped kernels (O, I, h, w), as matrices (O, I h w).

    Each update is scaled to AdamW's root mean square (Liu et al. 2025), so `lr` is of the order of AdamW's; NAdamW uses
    `other_lr`, or `lr` if that is None. As in `adamw`, parameters of one dimension are not decayed. The implementation
    is timm's; raises UserError if the installed timm has none.
    """
    try:
        from timm.optim.muon import Muon
    except ImportError as error:
        raise UserError(
            "optimizer.name=muon: the installed timm has no Muon; `pip install -U timm`, or use adamw"
        ) from error

    class PortableMuon(Muon):
        """timm's Muon, its products in float32 on a device that only emulates bf16, where they take half of a step."""

        @torch.no_grad()
        def step(self, closure: Callable | None = None) -> float | None:
            """Update the parameters."""
            with _orthogonalise_in(torch.bfloat16 if _multiplies_bf16(self.param_groups) else torch.float32):
                return super().step(closure)

    dense = [m for m in model.modules() if isinstance(m, nn.Linear)]
    dense += [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and convolutions]
    matrices = {id(layer.weight) for layer in dense}
    trained = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in trained if id(p) not in matrices]
    nadamw = {"lr": lr if other_lr is None else other_lr, "use_fallback": True}
    groups = [
        {"params": [p for p in trained if id(p) in matrices], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() > 1], "weight_decay": weight_decay, **nadamw},
        {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0, **nadamw},
    ]
    return PortableMuon([g for g in groups if g["params"]], lr=lr, momentum=momentum, nesterov=True, betas=betas)


def _multiplies_bf16(groups: Sequence[dict]) -> bool:
    device = groups[0]["params"][0].device
    return device.type != "cpu" or has_bf16(device)


@contextmanager
def _orthogonalise_in(dtype: torch.dtype) -> Iterator[None]:
    """Compute timm's Newton-Schulz iteration in `dtype` within the context; timm has a parameter but no setting."""
    from timm.optim import muon as module

    original = module.zeropower_via_newtonschulz
    module.zeropower_via_newtonschulz = partial(original, dtype=dtype)
    try:
        yield
    finally:
        module.zeropower_via_newtonschulz = original


@dataclass(frozen=True)
class CosineSchedule:
    """Learning-rate factor that warms up linearly and then falls along a cosine from one to `final`.

    With `horizon`, the factors are those of a run of that many steps, of which this run does the first.
    """

    warmup: float = 0.02  # share of the steps
    final: float = 0.0
    horizon: int | None = None  # steps

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise UserError(f"schedule.warmup={self.warmup}: expected a share of the steps, at least 0 and below 1")

    def __call__(self, step: int, steps: int) -> float:
        """Return the factor of the learning rate at `step` of `steps`, counted from zero."""
        if self.horizon is not None and self.horizon < steps:
            raise UserError(f"schedule.horizon={self.horizon}: the run has {steps} steps; expected at least as many")
        steps = self.horizon or steps
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class ConstantSchedule:
    """Learning-rate factor that is one after a linear warm-up."""

    warmup: float = 0.0  # share of the steps

    def __call__(self, step: int, steps: int) -> float:
        """Return the factor of the learning rate at `step` of `steps`, counted from zero."""
        warm = math.ceil(self.warmup * steps)
        return min(1.0, (step + 1) / warm) if warm else 1.0


@dataclass(frozen=True)
class StepSchedule:
    """Learning-rate factor that is multiplied by `factor` at each milestone."""

    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)  # shares of the steps; CIFAR-100: epochs 150, 180, 210 of 240
    factor: float = 0.1

    def __post_init__(self) -> None:
        if not all(0 < milestone < 1 for milestone in self.milestones):
            raise UserError(
                f"schedule.milestones={list(self.milestones)}: expected shares of the steps between 0 and 1"
            )

    def __call__(self, step: int, steps: int) -> float:
        """Return the factor of the learning rate at `step` of `steps`, counted from zero."""
        return self.factor ** sum(step >= milestone * steps for milestone in self.milestones)


class LearningRates:
    """Sets the learning rates of an optimizer's groups, by a schedule of factors."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Callable[[int, int], float], steps: int) -> None:
        self._optimizer, self._schedule, self._steps = optimizer, schedule, steps
        self._full = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> None:
        """Set the rates of a step, counted from zero."""
        for group, rate in zip(self._optimizer.param_groups, self._full, strict=True):
            group["lr"] = rate * self._schedule(step, self._steps)

    @property
    def first(self) -> float:
        """Return the rate of the first group."""
        return self._optimizer.param_groups[0]["lr"]

    def largest(self, steps: int) -> float:
        """Return the largest rate of the first `steps`."""
        return max(self._full) * max(self._schedule(step, self._steps) for step in range(steps))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw, "muon": muon, "sgd": sgd}
SCHEDULES: dict[str, Callable[..., Callable[[int, int], float]]] = {
    "cosine": CosineSchedule,
    "constant": ConstantSchedule,
    "steps": StepSchedule,
}
