"""FitNet: the student's output, projected to the teacher's shape by a learned layer."""

from torch import Tensor, nn

from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


class FitNet(nn.Module):
    """Mean over the channels of (r(s) - t)^2, one value per sample or patch of the teacher's map, with r learned.

    (Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, Eq. 3, without its factor 1/2.) For maps, r is a
    convolution to the teacher's height, width and channels, BatchNorm and ReLU, as in RepDistiller and mdistiller
    (scale 100); the ReLU suits a teacher's output that follows a ReLU itself. For vectors, r is one linear layer.
    """

    def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...], relu: bool | None = None) -> None:
        super().__init__()
        self.projection = projection(student, teacher, "distance.name=fitnet", relu)

    def forward(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors (B, C), or (B, H W) for maps, with the teacher's H and W."""
        student, teacher = seen.pair()
        projected = self.projection(student)
        assert projected.shape == teacher.shape, f"made for another shape than {tuple(student.shape[1:])}"
        return channel_mean((projected - teacher).square())


def projection(
    student: tuple[int, ...], teacher: tuple[int, ...], setting: str, relu: bool | None = None
) -> nn.Sequential:
    """Return layers that map the student's output shape to the teacher's, (C, H, W) or (C,) both.

    They end in a ReLU if `relu` is true, or if it is None and the outputs are maps. Raises UserError that names
    `setting` if the shapes are of two kinds or no convolution fits.
    """
    maps = are_maps(student, teacher, setting)
    layers: list[nn.Module] = [nn.Linear(student[0], teacher[0])]
    if maps:
        layers = [_resizing(student, teacher, setting), nn.BatchNorm2d(teacher[0])]
    if maps if relu is None else relu:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _resizing(student: tuple[int, ...], teacher: tuple[int, ...], setting: str) -> nn.Module:
    (channels, h, w), (out, to_h, to_w) = student, teacher
    if (h, w) == (2 * to_h, 2 * to_w):
        return nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False)  # no bias: the BatchNorm after it has one
    if (2 * h, 2 * w) == (to_h, to_w):
        return nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1, bias=False)
    if h >= to_h and w >= to_w:
        return nn.Conv2d(channels, out, (1 + h - to_h, 1 + w - to_w), bias=False)
    raise UserError(
        f"{setting}: cannot project the student's {h} x {w} map to the teacher's {to_h} x {to_w}; the student's map "
        f"must have half the teacher's size, or at least its size. Choose another output, or at or vid, which pool"
    )


def channel_mean(values: Tensor) -> Tensor:
    """Return the mean over the channels of (B, C) or (B, C, H, W): (B,) or (B, H W)."""
    mean = values.mean(1)
    return mean.flatten(1) if mean.dim() > 1 else mean


def are_maps(student: tuple[int, ...], teacher: tuple[int, ...], setting: str) -> bool:
    """Return whether the outputs of one image are maps (C, H, W), not vectors (C,).

    Raises UserError that names `setting` if one is a map and the other a vector.
    """
    if (len(student), len(teacher)) not in ((1, 1), (3, 3)):
        raise UserError(
            f"{setting}: the student's output for an image has shape {student}, the teacher's {teacher}; choose two "
            f"maps (C, H, W) or two vectors (C,)"
        )
    return len(student) == 3
