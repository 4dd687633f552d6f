"""Mean squared error over channels."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


@dataclass(frozen=True)
class MSE:
    """Mean over the channels of the squared difference, one value per sample or patch.

    With `normalize`, of the unit vectors: |u - v|^2 / C = 2 (1 - cos) / C, so 2 / C for unrelated ones.
    """

    normalize: bool = False

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors (B, C), or (B, H W) for maps (B, C, H, W)."""
        student, teacher = same_shape(seen)
        if self.normalize:
            student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        distance = (student - teacher).square().mean(1)
        return distance.flatten(1) if distance.dim() > 1 else distance


def same_shape(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return the pair that the term compares. UserError unless both are of one shape, (B, C) or (B, C, H, W)."""
    student, teacher = seen.pair()
    if student.shape != teacher.shape:
        raise UserError(
            f"distance: an image's output is {tuple(student.shape[1:])} by the student and {tuple(teacher.shape[1:])} "
            f"by the teacher; choose a student of the teacher's size, or another output"
        )
    return student, teacher
