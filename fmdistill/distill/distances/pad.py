"""Prime-aware adaptive distillation (PAD)."""

# Legend: B images, C channels, N = H W patches.

from typing import Literal

import torch
from torch import Tensor, nn

from fmdistill.distill.distances.at import attention_pair, require_maps, smaller_size
from fmdistill.distill.distances.fitnet import are_maps, channel_mean, projection
from fmdistill.distill.distances.mse import require_same_shape
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError

POWER = 2.0  # AT's p


class PAD(nn.Module):
    """Mean over the channels of d / (eps + e^v) + v, one value per sample or patch, with v learned from the student.

    d is the squared gap and v its log-variance, one per sample, patch and channel: entries that are hard for the
    student get a large variance and count less. No gradient is stopped. (Zhang et al., "Prime-Aware Adaptive
    Distillation", ECCV 2020, Eq. 7, averaged as in the authors' code.) `base` chooses what the gap is between:

    - l2: the outputs, of one shape;
    - fitnet: the student's output, projected as by `FitNet`, and the teacher's;
    - at: the attention maps of `AT`, with one variance per patch.

    v is BatchNorm(W x) of the student's side x of the gap, initially with mean zero and variance one. W is a linear
    layer for vectors, which include the attention over N patches (N x N weights), and a 1 x 1 convolution for maps.

    The best v is ln d, with the loss 1 + ln d: its gradient grows as the gap shrinks, limited only by clamping v to
    [-`clamp`, `clamp`]. The authors therefore train in two stages, both with cross-entropy (ImageNet): 90 epochs with
    15 times the mean squared error, then 30 epochs from those weights with PAD at a hundredth of the learning rate. A
    `warmup` of the term is the paper's milder remedy.
    """

    def __init__(
        self,
        student: tuple[int, ...],
        teacher: tuple[int, ...],
        base: Literal["l2", "fitnet", "at"] = "l2",
        clamp: float = 10.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if not (clamp > 0 and eps >= 0):
            raise UserError(f"distance.clamp={clamp}, distance.eps={eps}: expected a clamp above 0, an eps not below")
        self.base, self.clamp, self.eps = base, clamp, eps
        self.projection = projection(student, teacher, "distance.base=fitnet") if base == "fitnet" else nn.Identity()
        self.branch = _branch(_compared(student, teacher, base))

    def forward(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors (B, C), or (B, N) for maps: N patches of the teacher's, with `at` of the smaller."""
        student, teacher = self._pair(seen)
        return self._per_patch(attenuated((student - teacher).square(), self._log_variance(student), self.eps))

    @torch.no_grad()
    def variance(self, seen: Seen) -> Tensor:
        """Return the learned variance, averaged over the channels, of the distance's shape.

        In training mode BatchNorm uses the batch's statistics, as in the distance, and updates its running ones again.
        """
        return self._per_patch(self._log_variance(self._pair(seen)[0]).exp())

    def _pair(self, seen: Seen) -> tuple[Tensor, Tensor]:
        if self.base == "at":
            return attention_pair(seen, POWER, "distance.base=at")
        student, teacher = require_same_shape(seen) if self.base == "l2" else seen.pair()
        return self.projection(student), teacher

    def _log_variance(self, student: Tensor) -> Tensor:
        return self.branch(student).clamp(-self.clamp, self.clamp)

    def _per_patch(self, values: Tensor) -> Tensor:
        return values if self.base == "at" else channel_mean(values)


def attenuated(gap: Tensor, log_variance: Tensor, eps: float) -> Tensor:
    """Return d / (eps + e^v) + v for each squared gap d and log-variance v, of any one shape."""
    return gap / (eps + log_variance.exp()) + log_variance


def _compared(student: tuple[int, ...], teacher: tuple[int, ...], base: str) -> tuple[int, ...]:
    """Return the shape of the student's side of the gap for one image."""
    if base == "at":
        require_maps(student, teacher, "distance.base=at")
        height, width = smaller_size(student, teacher)
        return (height * width,)
    are_maps(student, teacher, f"distance.base={base}")
    if base == "l2" and student != teacher:
        raise UserError(
            f"distance.base=l2: the student's output for an image has shape {student}, the teacher's {teacher}; choose "
            f"base fitnet, which projects, or outputs of one shape"
        )
    return teacher


def _branch(shape: tuple[int, ...]) -> nn.Sequential:
    channels = shape[0]  # no bias: the BatchNorm after it has one
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(channels, channels, bias=False), nn.BatchNorm1d(channels))
    return nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
