"""Weights of the masks of an image: by how wrong the student's are, and by their size."""

# Legend: B images, K masks of an image.

from dataclasses import dataclass

from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import Group, grouped, mean_one
from fmdistill.registry import UserError

OUTPUTS = ("masks", "mask_tokens", "mask_iou")  # outputs with a value for each mask


@dataclass(frozen=True)
class HardMask:
    """Weighs a mask more, the less the student's agrees with the teacher's.

    w = sigmoid(1 / (IoU + eps) - 1), with the IoU of the two masks, divided by its mean over the group. (Shu et al.,
    "TinySAM: Pushing the Envelope for Efficient Segment Anything Model", AAAI 2025, whose weight is
    sigmoid(IoU_teacher / (IoU_student + eps) - 1), both against a third mask; here the teacher's mask is the truth, so
    that its IoU is 1.) A mask that is right has half the weight of one that is all wrong.
    """

    eps: float = 1e-6
    group: Group | None = None  # None = the masks of an image

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights (B, K)."""
        student, teacher = masks(seen, "hard_mask")
        both, either = (student & teacher).sum((2, 3)), (student | teacher).sum((2, 3))
        iou_BK = both.to(distance) / either.clamp_min(1)
        iou_BK[either == 0] = 1.0
        return by_group((1 / (iou_BK + self.eps) - 1).sigmoid(), distance, seen, self.group)


@dataclass(frozen=True)
class MaskArea:
    """Weighs a mask by area^-power, divided by its mean over the group, so that small masks count more.

    The area is that of the teacher's mask in cells of the low resolution, at least one.
    """

    power: float = 0.5
    group: Group | None = None  # None = the masks of an image

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise UserError(f"weighting.power={self.power}: expected a power above 0; use uniform for none")

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights (B, K)."""
        _, teacher = masks(seen, "mask_area")
        area_BK = teacher.sum((2, 3)).clamp_min(1).to(distance)
        return by_group(area_BK**-self.power, distance, seen, self.group)


def masks(seen: Seen, weighting: str) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's masks, bool (B, K, n, n); UserError if the term compares no masks."""
    output = seen.output.rpartition(".")[2]
    if output not in OUTPUTS:
        raise UserError(
            f"weighting.name={weighting}: weighs masks, but the term has output={seen.output}; use {', '.join(OUTPUTS)}"
        )
    real = seen.teacher("cells")[:, None]
    return (seen.student("masks").detach() > 0) & real, (seen.teacher("masks") > 0) & real


def by_group(raw_BK: Tensor, distance: Tensor, seen: Seen, group: Group | None) -> Tensor:
    """Return weights of the shape of the distance, with a mean of one over each group."""
    _, valid = grouped(distance, seen, group)
    return mean_one(raw_BK.view_as(valid), valid).view_as(distance)
