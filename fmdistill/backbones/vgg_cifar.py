"""VGG with BN for 32-px images, as in the CIFAR-100 distillation tables.

Simonyan and Zisserman 2015 (arXiv:1409.1556); one linear layer, and the strides of RepDistiller (Tian et al. 2020).
Parameters are counted at 100 classes.
"""

from torch import nn

from fmdistill.backbones.classifier import Classifier, staged

WIDTHS = (64, 128, 256, 512, 512)


def vgg8(classes: int = 100) -> Classifier:
    """Return VGG with one convolution per stage, 3.965 M parameters; blocks as described at `vgg`."""
    return vgg(1, classes)


def vgg13(classes: int = 100) -> Classifier:
    """Return VGG-13, with two convolutions per stage, 9.462 M parameters; blocks as described at `vgg`."""
    return vgg(2, classes)


def vgg(convolutions: int, classes: int) -> Classifier:
    """Return a VGG of five stages of `convolutions` 3x3 convolutions, each with bias, BN and ReLU.

    The first stage is the stem; block1 to block4, after their ReLU, are the other four at strides 2, 4, 8 and 8.
    """
    stem = nn.Sequential(*_layers(3, WIDTHS[0], convolutions))
    stages = []
    for i in range(1, 5):
        pool = [nn.MaxPool2d(2)] if i < 4 else []
        stages.append(nn.Sequential(*pool, *_layers(WIDTHS[i - 1], WIDTHS[i], convolutions)))
    return staged(stem, stages, WIDTHS[-1], classes, tail=nn.Identity())


def _layers(channels: int, out: int, convolutions: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i in range(convolutions):
        convolution = nn.Conv2d(out if i else channels, out, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
    return layers
