"""FitNet: the student's output, projected to the teacher's shape by a learned layer."""

from torch import Tensor, nn

from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


class FitNet(nn.Module):
    """Mean over the channels of (r(s) - t)^2, one value per sample or patch of the teacher's map, with r learned.

    (Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, Eq. 3, without its factor of a half.) For maps r is
    a convolution to the teacher's height, width and channels, BatchNorm and ReLU, as RepDistiller and mdistiller have
    it (who weigh it 100); the ReLU suits a teacher's output that is one. For vectors r is one linear layer.
    """

    def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...], relu: bool | None = None) -> None:
        super().__init__()
        self.projection = projection(student, teacher, "distance.name=fitnet", relu)

    def forward(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors (B, C), or (B, H W) for maps, H W of the teacher's."""
        student, teacher = seen.pair()
        projected = self.projection(student)
        assert projected.shape == teacher.shape, f"made for another shape than {tuple(student.shape[1:])}"
        return channel_mean((projected - teacher).square())


def projection(
    student: tuple[int, ...], teacher: tuple[int, ...], asking: str, relu: bool | None = None
) -> nn.Sequential:
    """Return the layers from one image's output (C, H, W) or (C,) to the other's. `relu` None = for maps alone."""
    maps = are_maps(student, teacher, asking)
    layers: list[nn.Module] = [nn.Linear(student[0], teacher[0])]
    if maps:
        layers = [_resizing(student, teacher, asking), nn.BatchNorm2d(teacher[0])]
    if maps if relu is None else relu:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _resizing(student: tuple[int, ...], teacher: tuple[int, ...], asking: str) -> nn.Module:
    (channels, h, w), (out, to_h, to_w) = student, teacher
    if (h, w) == (2 * to_h, 2 * to_w):
        return nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False)  # no bias: the BatchNorm after it has one
    if (2 * h, 2 * w) == (to_h, to_w):
        return nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1, bias=False)
    if h >= to_h and w >= to_w:
        return nn.Conv2d(channels, out, (1 + h - to_h, 1 + w - to_w), bias=False)
    raise UserError(
        f"{asking}: no convolution of its brings the student's map of {h} x {w} to the teacher's {to_h} x {to_w}; it "
        f"takes one of half the size, or of the same size or more. Choose another output, or at or vid, which pool"
    )


def channel_mean(values: Tensor) -> Tensor:
    """Return the mean over the channels of (B, C) or (B, C, H, W): (B,) or (B, H W)."""
    mean = values.mean(1)
    return mean.flatten(1) if mean.dim() > 1 else mean


def are_maps(student: tuple[int, ...], teacher: tuple[int, ...], asking: str) -> bool:
    """Tell whether one image's outputs are maps (C, H, W) rather than vectors (C,). UserError where they differ."""
    if (len(student), len(teacher)) not in ((1, 1), (3, 3)):
        raise UserError(
            f"{asking}: an image's output is {student} by the student and {teacher} by the teacher; it takes two maps "
            f"(C, H, W) or two vectors (C,), so choose outputs of one kind"
        )
    return len(student) == 3
