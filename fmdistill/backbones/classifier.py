"""Image classifiers, all of which return their logits, pooled feature and stages under the same names.

Legend: B images, S their side in pixels, K classes, D channels of the feature, C, H, W channels and grid of a stage.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from fmdistill.registry import UserError


class Classifier(nn.Module):
    """An image classifier around `network`, whose last layer is the linear layer named `head`."""

    def __init__(self, network: nn.Module, head: str = "head", image_size: int = 32) -> None:
        super().__init__()
        self.network, self.head_name = network, head
        self.image_size, self.classes = image_size, self.head.out_features

    @property
    def head(self) -> nn.Linear:
        """Return the network's last layer, which is linear (D -> K)."""
        head = self.network.get_submodule(self.head_name)
        assert isinstance(head, nn.Linear), f"{self.head_name} is a {type(head).__name__}"
        return head

    def forward(self, image_B3SS: Tensor) -> dict[str, Tensor]:
        """Return {"logits": (B, K), "feature": (B, D), "block1": (B, C, H, W), ...} for normalised float images.

        The feature is the head's input, a vector after global average pooling: logits = head(feature). block1 to blockN
        are the outputs of the network's N stages, finest first; its builder documents the last operation of a stage.
        """
        return self.network(image_B3SS)


class Staged(nn.Module):
    """A network of stem, stages, tail, global average pooling and a linear head.

    Convolutions are initialised from Kaiming's normal distribution by fan-out, with zero bias, as in RepDistiller and
    mdistiller; norms and head have PyTorch's initialisation.
    """

    def __init__(
        self, stem: nn.Module, stages: Sequence[nn.Module], tail: nn.Module, features: int, classes: int
    ) -> None:
        super().__init__()
        self.stem, self.stages, self.tail = stem, nn.ModuleList(stages), tail
        self.head = nn.Linear(features, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image_B3SS: Tensor) -> dict[str, Tensor]:
        """Return {"logits", "feature", "block1", ...}, as described at `Classifier`."""
        x_BCHW, blocks = self.stem(image_B3SS), {}
        for number, stage in enumerate(self.stages, start=1):
            x_BCHW = blocks[f"block{number}"] = stage(x_BCHW)
        feature_BD = self.tail(x_BCHW).mean((2, 3))
        return {"logits": self.head(feature_BD), "feature": feature_BD, **blocks}


def staged(
    stem: nn.Module, stages: Sequence[nn.Module], features: int, classes: int, *, tail: nn.Module, image_size: int = 32
) -> Classifier:
    """Return a classifier of these stages; `features` is the number of channels after `tail`."""
    return Classifier(Staged(stem, stages, tail, features, check_classes(classes)), image_size=image_size)


def check_classes(classes: int) -> int:
    """Return `classes`. Raises UserError if there are fewer than two."""
    if classes < 2:
        raise UserError(f"classes={classes}: expected at least 2; set it to the number of classes of the data")
    return classes


def normed(channels: int, out: int, side: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    """Return a convolution without bias, padded by side // 2, followed by BN and, if `relu`, ReLU."""
    convolution = nn.Conv2d(channels, out, side, stride, padding=side // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), *([nn.ReLU(inplace=True)] if relu else []))
