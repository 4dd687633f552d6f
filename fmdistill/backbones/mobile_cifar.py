"""MobileNetV2 and ShuffleNet for 32-px images, as in the CIFAR-100 distillation tables.

Sandler et al. 2018 (arXiv:1801.04381) and Zhang et al. 2018 (arXiv:1707.01083); strides and widths are those of
RepDistiller (Tian et al. 2020). Parameters are counted at 100 classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.backbones.classifier import Classifier, normed, staged
from fmdistill.registry import UserError

EXPANSION = 6
# Channels at full width, blocks and stride of MobileNetV2's seven rows, which `STAGES` groups into stages.
ROWS = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
STAGES = ((0, 1), (2,), (3, 4), (5, 6))
SHUFFLE_STEM, SHUFFLE_WIDTHS, SHUFFLE_UNITS, SHUFFLE_GROUPS = 24, (240, 480, 960), (4, 8, 4), 3


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand by 1x1, 3x3 per channel, project by 1x1 without ReLU; add x if it has that shape."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.adds = stride == 1 and channels == out
        self.body = nn.Sequential(
            normed(channels, inner, 1),
            normed(inner, inner, 3, stride, groups=inner),
            normed(inner, out, 1, relu=False),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, out, H / stride, W / stride), any sign."""
        return x_BCHW + self.body(x_BCHW) if self.adds else self.body(x_BCHW)


class ShuffleUnit(nn.Module):
    """ShuffleNet's block: grouped 1x1, channels shuffled, 3x3 per channel, grouped 1x1.

    At stride 1, x is added; at stride 2, its averages are appended, so the body returns `out` - `channels` channels.
    Inside, the body has a quarter of the channels that it returns. The 3x3 has a ReLU, which the paper omits.
    """

    def __init__(self, channels: int, out: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        returned = out if stride == 1 else out - channels
        inner = returned // 4
        self.stride, self.groups = stride, first_groups
        self.reduce = normed(channels, inner, 1, groups=first_groups)
        self.expand = nn.Sequential(
            normed(inner, inner, 3, stride, groups=inner), normed(inner, returned, 1, groups=groups, relu=False)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, out, H / stride, W / stride), zero or more."""
        y_BCHW = self.expand(shuffle(self.reduce(x_BCHW), self.groups))
        if self.stride == 1:
            return F.relu(y_BCHW + x_BCHW)
        return F.relu(torch.cat([y_BCHW, F.avg_pool2d(x_BCHW, 3, self.stride, padding=1)], 1))


def shuffle(x_BCHW: Tensor, groups: int) -> Tensor:
    """Shuffle the channels (B, C, H, W) across `groups` groups, as ShuffleNet does."""
    return x_BCHW.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def mobilenet_v2(classes: int = 100, width: float = 0.5) -> Classifier:
    """Return MobileNetV2 at `width` with expansion 6, 0.813 M parameters at 0.5: the tables' MobileNetV2 or MV2.

    block1 to block4 end without ReLU, as is usual for MobileNetV2, and have strides 2, 4, 8 and 16. The stem's stride
    is 2; the last 1x1 convolution has 1,280 output channels, more if `width` is above 1. As in RepDistiller, the first
    row is expanded too (by 1), and ReLU is not capped at 6.
    """
    if not 1 / 16 <= width <= 4:
        raise UserError(f"mobilenet_v2: width={width}: expected a factor from 0.0625 to 4, such as 0.5")
    channels, stages = int(32 * width), []
    stem = normed(3, channels, 3, stride=2)
    for rows in STAGES:
        blocks = []
        for row in rows:
            full, count, stride = ROWS[row]
            out, expansion = int(full * width), EXPANSION if row else 1
            for i in range(count):
                blocks.append(InvertedResidual(channels, out, stride if i == 0 else 1, expansion))
                channels = out
        stages.append(nn.Sequential(*blocks))
    last = int(1280 * max(width, 1.0))
    return staged(stem, stages, last, classes, tail=normed(channels, last, 1))


def shufflenet_v1(classes: int = 100) -> Classifier:
    """Return ShuffleNet with 3 groups, 0.949 M parameters: the tables' ShuffleNetV1.

    block1 to block3, after their ReLU, have 240, 480 and 960 channels at strides 2, 4 and 8. The stem is a 1x1
    convolution of stride 1; the first grouped convolution after it has one group, since it has few channels.
    """
    stages, channels = [], SHUFFLE_STEM
    for out, count in zip(SHUFFLE_WIDTHS, SHUFFLE_UNITS, strict=True):
        first_groups = 1 if channels == SHUFFLE_STEM else SHUFFLE_GROUPS
        units = [ShuffleUnit(channels, out, 2, SHUFFLE_GROUPS, first_groups)]
        units += [ShuffleUnit(out, out, 1, SHUFFLE_GROUPS, SHUFFLE_GROUPS) for _ in range(count - 1)]
        stages.append(nn.Sequential(*units))
        channels = out
    return staged(normed(3, SHUFFLE_STEM, 1), stages, channels, classes, tail=nn.Identity())
