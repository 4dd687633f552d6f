"""Variational information distillation (VID)."""

# Legend: C channels of the teacher.

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.distill.distances.at import pool_larger
from fmdistill.distill.distances.fitnet import are_maps, channel_mean
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError

SMALLEST = 1e-5  # variance


class VID(nn.Module):
    """Mean over the channels of 0.5 [(r(s) - t)^2 / v + ln v], one value per sample or patch, with r and v learned.

    v = ln(1 + e^a) + 1e-5 is one variance per channel for all samples, initially `initial`: a channel that the student
    cannot predict gets a large variance and counts less. (Ahn et al., "Variational Information Distillation for
    Knowledge Transfer", CVPR 2019.) r is three 1 x 1 convolutions, or three linear layers for vectors, with ReLU
    between them and `hidden` channels (None: as many as the teacher's). The larger map is average-pooled first.
    """

    def __init__(
        self, student: tuple[int, ...], teacher: tuple[int, ...], initial: float = 5.0, hidden: int | None = None
    ) -> None:
        super().__init__()
        if not initial > SMALLEST:
            raise UserError(f"distance.initial={initial}: expected a variance above {SMALLEST}")
        if hidden is not None and hidden < 1:
            raise UserError(f"distance.hidden={hidden}: expected at least 1 channel, or null for the teacher's count")
        self.maps = are_maps(student, teacher, "distance.name=vid")
        widths = (student[0], hidden or teacher[0], hidden or teacher[0], teacher[0])
        first, *others = (self._layer(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.regressor = nn.Sequential(first, *(m for layer in others for m in (nn.ReLU(), layer)))
        softened = initial - SMALLEST
        self.before_softplus_C = nn.Parameter(torch.full(teacher[:1], softened + math.log(-math.expm1(-softened))))

    def forward(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors (B, C), or (B, H W) for maps, with H and W of the smaller map."""
        student, teacher = pool_larger(*seen.pair()) if self.maps else seen.pair()
        variance = self.variance().view(-1, 1, 1) if self.maps else self.variance()
        gap = (self.regressor(student) - teacher).square()
        return channel_mean(0.5 * (gap / variance + variance.log()))

    def variance(self) -> Tensor:
        """Return the variance of each of the teacher's channels, (C,)."""
        return F.softplus(self.before_softplus_C) + SMALLEST

    def _layer(self, channels: int, out: int) -> nn.Module:
        return nn.Conv2d(channels, out, 1) if self.maps else nn.Linear(channels, out)
