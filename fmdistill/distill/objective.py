"""The objective: named terms, each measure -> weigh -> reduce, and only the last step reduces."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmdistill.distill.distances import DISTANCES
from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings import WEIGHTINGS
from fmdistill.registry import UserError, bind, typed


@dataclass(frozen=True)
class TermSettings:
    """One term of a recipe's objective."""

    distance: dict
    weighting: dict
    output: str = "embedding"
    padding: Literal["include", "exclude"] = "include"  # whether padded patches take part; the SRW paper includes them
    scale: float = 1.0


class Term(nn.Module):
    """One weighted distance. A distance that learns is a submodule, so it reaches optimizer and checkpoint."""

    def __init__(self, settings: TermSettings, where: str) -> None:
        super().__init__()
        self.settings = settings
        self.distance = bind(settings.distance, DISTANCES, f"{where}.distance")()
        self.weighting = bind(settings.weighting, WEIGHTINGS, f"{where}.weighting")()

    def forward(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the term's scalar loss and its statistics: effective sample size and largest weight."""
        seen = seen.focus(self.settings.output, self.settings.padding)
        student, teacher = seen.pair(self.settings.output)
        distance = self.distance(_exact(student), _exact(teacher))
        weight = self.weighting(distance.detach(), seen)
        loss = self.settings.scale * reduce(weight * distance, seen.valid)
        return loss, {
            "effective_sample_size": effective_sample_size(weight, seen.valid),
            "largest_weight": weight.max(),
        }


class Objective(nn.Module):
    """A mapping of named terms."""

    def __init__(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.terms = nn.ModuleDict({name: Term(s, f"objective.{name}") for name, s in check(settings).items()})

    def forward(self, seen: Seen) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the named losses and the named statistics."""
        losses, statistics = {}, {}
        for name, term in self.terms.items():
            losses[name], found = term(seen)
            statistics |= {f"{name}/{key}": value for key, value in found.items()}
        return losses, statistics


def check(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, TermSettings]:
    """Type every term and bind its components, without touching data."""
    if not settings:
        raise UserError("objective: names no term; a recipe that distils needs one, such as objective.embedding")
    terms = {name: TermSettings(**typed(TermSettings, s, f"objective.{name}")) for name, s in settings.items()}
    for name, term in terms.items():
        bind(term.distance, DISTANCES, f"objective.{name}.distance")
        bind(term.weighting, WEIGHTINGS, f"objective.{name}.weighting")
    return terms


def reduce(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean over the batch of each image's sum over its valid count; (B, N) with (B, N) valid, or (B,)."""
    if values.dim() == 1:
        return values.mean()
    assert valid is not None
    return (values.sum(1) / valid.sum(1).clamp_min(1)).mean()


@torch.no_grad()
def effective_sample_size(weight: Tensor, valid: Tensor | None) -> Tensor:
    """Return (sum w)^2 / (n sum w^2) in (0, 1]: the images' mean over valid patches; for (B,) over the micro-batch."""
    if weight.dim() == 1:
        return weight.sum().square() / (len(weight) * weight.square().sum())
    assert valid is not None
    count_B = valid.sum(1).clamp_min(1)
    return (weight.sum(1).square() / (count_B * weight.square().sum(1).clamp_min(1e-12))).mean()


def _exact(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))
