"""Distances between the masks that student and teacher make for the same prompts."""

# Legend: B images, K masks of an image, n their resolution, g patches a side, N = g * g.

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.distances.mse import require_same_shape
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


@dataclass(frozen=True)
class Mask:
    """`bce` times the binary cross-entropy and `dice` times the dice loss of each mask, for output=masks.

    The teacher's mask is y = 1 if its logit is above 0, the student's logits are z and p = sigmoid(z), over the cells
    that hold real pixels: bce = mean(softplus(z) - y z), dice = 1 - (2 sum(p y) + 1) / (sum p + sum y + 1). (Zhou et
    al., "EdgeSAM: Prompt-In-the-Loop Distillation for On-Device Deployment of SAM", 2023, with weights of 5 and 5.)
    With `soft`, y is the teacher's sigmoid(logit). Cross-entropy counts cells, so that of a small mask is small; dice
    does not depend on a mask's size.
    """

    bce: float = 1.0
    dice: float = 1.0
    soft: bool = False

    def __post_init__(self) -> None:
        if not (self.bce >= 0 and self.dice >= 0 and self.bce + self.dice > 0):
            raise UserError(
                f"distance.bce={self.bce}, distance.dice={self.dice}: expected weights of at least 0, and one above 0"
            )

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B, K) for logits (B, K, n, n)."""
        logits, teacher = require_same_shape(seen)
        real = seen.teacher("cells")[:, None]
        target = (teacher.sigmoid() if self.soft else (teacher > 0).to(logits)) * real
        area, distance = real.sum((2, 3)).clamp_min(1), torch.zeros_like(logits[..., 0, 0])
        if self.bce:
            distance = distance + self.bce * ((F.softplus(logits) - logits * target) * real).sum((2, 3)) / area
        if self.dice:
            chance = logits.sigmoid() * real
            both, either = (chance * target).sum((2, 3)), chance.sum((2, 3)) + target.sum((2, 3))
            distance = distance + self.dice * (1 - (2 * both + 1) / (either + 1))
        return distance


@dataclass(frozen=True)
class MaskPatches:
    """The binary cross-entropy of all masks of an image in each patch of the embedding, for output=mask_patches.

    A patch has the mean over its cells and over the image's masks, so that weightings of patches weigh the pixels of
    masks: `srw` with feature=embedding, for example. The formula is that of `mask`.
    """

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B, N) for logits (B, K, n, n)."""
        logits, teacher = require_same_shape(seen)
        assert seen.valid is not None
        side = round(seen.valid.shape[1] ** 0.5)
        real = seen.teacher("cells")[:, None].to(logits)
        loss = (F.softplus(logits) - logits * (teacher > 0)) * real
        cells = F.avg_pool2d(real, logits.shape[-1] // side)
        return (F.avg_pool2d(loss, logits.shape[-1] // side).mean(1) / cells[:, 0].clamp_min(1e-6)).flatten(1)


@dataclass(frozen=True)
class MaskChoice:
    """How likely the student is to choose another mask of an answer than the teacher, for output=mask_iou.

    A user gets the mask with the highest predicted IoU of masks 1 to 3. With the teacher's predictions t and the
    student's s, the distance is the Kullback-Leibler divergence of softmax(s / `temperature`) from softmax(t /
    `temperature`) over these masks, as in Hinton et al. 2015; a temperature near the usual gap between the best and the
    second mask makes the choice count and not the value.
    """

    temperature: float = 0.05  # in units of IoU

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"distance.temperature={self.temperature}: expected an IoU above 0, such as 0.05")

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B, Q) for predictions (B, 1, Q, M) of Q answers. Raises UserError for answers of one mask."""
        student, teacher = require_same_shape(seen)
        if student.dim() != 4 or student.shape[1] != 1 or student.shape[3] < 3:
            raise UserError(
                f"distance.name=mask_choice: compares which of several masks is chosen, but output={seen.output} has "
                f"one of each answer; use output=mask_iou with task.masks=all"
            )
        log_s, log_t = ((iou[:, 0, :, 1:] / self.temperature).log_softmax(-1) for iou in (student, teacher))
        return (log_t.exp() * (log_t - log_s)).sum(-1)
