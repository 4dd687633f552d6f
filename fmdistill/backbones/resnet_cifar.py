"""Residual networks for 32-px images, as in the CIFAR-100 distillation tables, and a small one for 8-px digits.

He et al. 2016 (arXiv:1512.03385), Zagoruyko and Komodakis 2016 (arXiv:1605.07146); the widths and the number of stages
are those of RepDistiller (Tian et al. 2020) and mdistiller. Parameters are counted at 100 classes.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.backbones.classifier import Classifier, normed, staged
from fmdistill.registry import UserError

CIFAR = (16, 16, 32, 64)  # channels of the stem and of three stages
CIFAR_X4 = (32, 64, 128, 256)


class Residual(nn.Module):
    """relu(body(x) + x); if the shapes differ, x passes a strided 1x1 convolution with BN first."""

    def __init__(self, body: nn.Module, channels: int, out: int, stride: int) -> None:
        super().__init__()
        same = channels == out and stride == 1
        self.body = body
        self.shortcut = nn.Identity() if same else normed(channels, out, 1, stride, relu=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, out, H / stride, W / stride)."""
        return F.relu(self.body(x_BCHW) + self.shortcut(x_BCHW))


class PreActivation(nn.Module):
    """A wide ResNet's block: BN and ReLU precede each convolution, and nothing follows the sum."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.body = nn.Sequential(normed(channels, out, 3, stride), second)
        self.shortcut = None if channels == out else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, out, H / stride, W / stride), any sign."""
        y_BCHW = self.norm(x_BCHW)
        return self.body(y_BCHW) + (x_BCHW if self.shortcut is None else self.shortcut(y_BCHW))


def basic(channels: int, out: int, stride: int) -> Residual:
    """Return a block of two 3x3 convolutions."""
    body = nn.Sequential(normed(channels, out, 3, stride), normed(out, out, 3, relu=False))
    return Residual(body, channels, out, stride)


def bottleneck(channels: int, out: int, stride: int) -> Residual:
    """Return a block of 1x1, 3x3 and 1x1 convolutions, a quarter as wide inside; the 3x3 has the stride."""
    inner = out // 4
    body = nn.Sequential(
        normed(channels, inner, 1), normed(inner, inner, 3, stride), normed(inner, out, 1, relu=False)
    )  # fmt: skip
    return Residual(body, channels, out, stride)


def resnet20(classes: int = 100) -> Classifier:
    """Return ResNet-20, 0.278 M parameters; blocks as described at `resnet`."""
    return resnet(20, CIFAR, classes)


def resnet32(classes: int = 100) -> Classifier:
    """Return ResNet-32, 0.473 M parameters, published as 0.47; blocks as described at `resnet`."""
    return resnet(32, CIFAR, classes)


def resnet56(classes: int = 100) -> Classifier:
    """Return ResNet-56, 0.862 M parameters; blocks as described at `resnet`."""
    return resnet(56, CIFAR, classes)


def resnet110(classes: int = 100) -> Classifier:
    """Return ResNet-110, 1.737 M parameters; blocks as described at `resnet`."""
    return resnet(110, CIFAR, classes)


def resnet8x4(classes: int = 100) -> Classifier:
    """Return ResNet-8 four times as wide, 1.234 M parameters; blocks as described at `resnet`."""
    return resnet(8, CIFAR_X4, classes)


def resnet32x4(classes: int = 100) -> Classifier:
    """Return ResNet-32 four times as wide, 7.434 M parameters; blocks as described at `resnet`."""
    return resnet(32, CIFAR_X4, classes)


def wrn_16_2(classes: int = 100) -> Classifier:
    """Return the wide ResNet of 16 layers, twice as wide, 0.703 M parameters; blocks as described at `wide_resnet`."""
    return wide_resnet(16, 2, classes)


def wrn_40_1(classes: int = 100) -> Classifier:
    """Return the wide ResNet of 40 layers at single width, 0.570 M parameters; blocks as described at `wide_resnet`."""
    return wide_resnet(40, 1, classes)


def wrn_40_2(classes: int = 100) -> Classifier:
    """Return the wide ResNet of 40 layers, twice as wide, 2.255 M parameters; blocks as described at `wide_resnet`."""
    return wide_resnet(40, 2, classes)


def resnet50_cifar(classes: int = 100) -> Classifier:
    """Return ResNet-50 with a 3x3 stem of stride 1, 23.705 M parameters; the teacher ResNet50 of the CIFAR tables.

    block1 to block4, after their ReLU, have 256 to 2,048 channels at strides 1, 2, 4 and 8.
    """
    widths, counts = (256, 512, 1024, 2048), (3, 4, 6, 3)
    stages = [_stage(bottleneck, widths[max(i - 1, 0)] if i else 64, widths[i], counts[i], i > 0) for i in range(4)]
    return staged(normed(3, 64, 3), stages, widths[-1], classes, tail=nn.Identity())


def digits_resnet(classes: int = 10, width: int = 8, depth: int = 8) -> Classifier:
    """Return a ResNet for 8-px images, `width` channels wide in its first stage; blocks as described at `resnet`.

    It trains on the source `digits` in seconds on one core: a teacher at width 32, a student at width 4.
    """
    if width < 1:
        raise UserError(f"digits_resnet: width={width}: expected at least 1 channel")
    return resnet(depth, (width, width, 2 * width, 4 * width), classes, image_size=8)


def resnet(depth: int, widths: tuple[int, int, int, int], classes: int, image_size: int = 32) -> Classifier:
    """Return a ResNet of basic blocks, `depth` = 6n + 2, with `widths` channels in stem and stages.

    block1 to block3, after their ReLU, have strides 1, 2 and 4. As in RepDistiller, shortcuts that change the shape are
    convolutions; He et al. pad with zeros. Raises UserError for another depth.
    """
    count, rest = divmod(depth - 2, 6)
    if rest or count < 1:
        raise UserError(f"ResNet of depth={depth}: expected 6n + 2, such as 8, 14 or 20")
    stages = [_stage(basic, widths[i], widths[i + 1], count, i > 0) for i in range(3)]
    return staged(normed(3, widths[0], 3), stages, widths[-1], classes, tail=nn.Identity(), image_size=image_size)


def wide_resnet(depth: int, factor: int, classes: int) -> Classifier:
    """Return a wide ResNet, `depth` = 6n + 4, its stages `factor` times as wide as 16, 32 and 64 channels.

    block1 to block3 are the sums that the next stage reads, before BN and ReLU, at strides 1, 2 and 4.
    """
    count, rest = divmod(depth - 4, 6)
    assert count > 0 and not rest, depth
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    stages = [_stage(PreActivation, widths[i], widths[i + 1], count, i > 0) for i in range(3)]
    tail = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True))
    return staged(nn.Conv2d(3, 16, 3, padding=1, bias=False), stages, widths[-1], classes, tail=tail)


def _stage(block: Callable[..., nn.Module], channels: int, out: int, count: int, halve: bool) -> nn.Sequential:
    """Return `count` blocks; the first changes the width, and halves the grid if `halve`."""
    return nn.Sequential(block(channels, out, 1 + halve), *(block(out, out, 1) for _ in range(count - 1)))
