"""Mean squared error over channels."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


@dataclass(frozen=True)
class MSE:
    """Squared difference averaged over the channels, one value per sample or patch.

    With `normalize`, both outputs are first scaled to unit length: |u - v|^2 / C = 2 (1 - cos) / C, which is 2 / C for
    orthogonal vectors.
    """

    normalize: bool = False

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors (B, C), or (B, H W) for maps (B, C, H, W)."""
        student, teacher = require_same_shape(seen)
        if self.normalize:
            student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        distance = (student - teacher).square().mean(1)
        return distance.flatten(1) if distance.dim() > 1 else distance


def require_same_shape(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's output, (B, C) or (B, C, H, W). Raises UserError if the shapes differ."""
    student, teacher = seen.pair()
    if student.shape != teacher.shape:
        raise UserError(
            f"distance: the student's output for an image has shape {tuple(student.shape[1:])}, the teacher's "
            f"{tuple(teacher.shape[1:])}; choose a student of the teacher's size, or another output"
        )
    return student, teacher
