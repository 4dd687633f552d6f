"""Attention transfer (AT)."""

# Legend: B images, C channels, N = H W patches of the smaller map.

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


@dataclass(frozen=True)
class AT:
    """Squared difference (A_s - A_t)^2 of the two outputs' attention maps, one value per patch.

    A is the mean over the channels of |f|^p, normalised to a vector of length one over the image's patches. The larger
    map is average-pooled to the smaller first; patches that `padding: exclude` leaves out are zero in A. (Zagoruyko and
    Komodakis, "Paying More Attention to Attention", ICLR 2017, Eq. 2, as the mean of squares in the authors' code;
    common scale 1000.)
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise UserError(f"distance.p={self.p}: expected a power of at least 1")

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B, N) for maps (B, C, H, W), which may differ in C, H and W. UserError for vectors."""
        student_BN, teacher_BN = attention_pair(seen, self.p, "distance.name=at")
        return (student_BN - teacher_BN).square()


def attention_pair(seen: Seen, p: float, setting: str) -> tuple[Tensor, Tensor]:
    """Return the attention maps of student and teacher, both (B, N) with rows of length one."""
    student, teacher = seen.pair()
    require_maps(student.shape[1:], teacher.shape[1:], setting)
    student_BN, teacher_BN = (output.abs().pow(p).mean(1).flatten(1) for output in pool_larger(student, teacher))
    if seen.valid is not None and seen.valid.shape == student_BN.shape:
        student_BN, teacher_BN = student_BN * seen.valid, teacher_BN * seen.valid
    return F.normalize(student_BN, dim=1), F.normalize(teacher_BN, dim=1)


def pool_larger(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps (B, C, H, W) to the height and width of the smaller; return both."""
    size = smaller_size(student.shape[1:], teacher.shape[1:])
    student, teacher = (
        output if output.shape[2:] == size else F.adaptive_avg_pool2d(output, size) for output in (student, teacher)
    )
    return student, teacher


def smaller_size(student: Sequence[int], teacher: Sequence[int]) -> tuple[int, int]:
    """Return the smaller height and the smaller width of two maps (C, H, W)."""
    return min(student[1], teacher[1]), min(student[2], teacher[2])


def require_maps(student: Sequence[int], teacher: Sequence[int], setting: str) -> None:
    """Raise a UserError that names `setting` unless the outputs of one image are maps (C, H, W)."""
    for shape in (student, teacher):
        if len(shape) != 3:
            raise UserError(
                f"{setting}: attention is over the patches of a map (C, H, W), but an image's output is a vector "
                f"{tuple(shape)}; choose an output of maps, or compare vectors by mse, cosine or fitnet"
            )
