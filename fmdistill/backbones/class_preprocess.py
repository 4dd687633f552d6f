"""Preprocessing of a classifier's images: resize, centre crop, mean and standard deviation."""

# Legend: B images, S the square's side, g = S / stride tokens per side.

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from fmdistill.backbones.pixels import Picture, all_valid, as_image, standardise
from fmdistill.registry import UserError, suggest

# Mean and standard deviation of RGB in [0, 1] over the training images; for the digits, over all 1,797 images.
STATISTICS = {
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": ((0.305, 0.305, 0.305), (0.376, 0.376, 0.376)),
}


@dataclass(frozen=True)
class ClassPreprocess:
    """Resizes the shorter side to S pixels by PIL's antialiased bicubic and crops the centre S x S.

    An image of S x S pixels is unchanged. `stride` is S / g of the outputs that are maps; with stride S, which `of`
    sets, an image is one token.
    """

    image_size: int = 32
    stride: int = 32
    mean: tuple[float, float, float] = STATISTICS["cifar100"][0]
    std: tuple[float, float, float] = STATISTICS["cifar100"][1]

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.stride < 1 or self.image_size % self.stride:
            raise UserError(f"preprocessing stride={self.stride}: expected a divisor of image_size={self.image_size}")

    @classmethod
    def of(cls, image_size: int, statistics: str) -> "ClassPreprocess":
        """Return the preprocessing for S = `image_size` with the mean and deviation named `statistics`."""
        if statistics not in STATISTICS:
            raise UserError(f"statistics={statistics}: unknown.{suggest(statistics, STATISTICS)}")
        return cls(image_size, image_size, *STATISTICS[statistics])

    def prepare(self, image: Picture) -> tuple[Tensor, tuple[int, int]]:
        """Return uint8 pixels (3, S, S) in RGB and (S, S); every pixel is real."""
        size = self.image_size
        # A list with one number makes torchvision resize the shorter side.
        resized: Any = TF.resize(as_image(image).convert("RGB"), [size], InterpolationMode.BICUBIC)  # type: ignore[arg-type]
        cropped: Any = TF.center_crop(resized, [size, size])
        return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).contiguous(), (size, size)

    def normalize(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Return uint8 pixels (B, 3, S, S) as float32 (x / 255 - mean) / std."""
        return standardise(pixels, self.mean, self.std)

    def valid(self, sizes: Tensor) -> Tensor:
        """Return bool (B, g, g), all True: a crop has no padding."""
        return all_valid(sizes, self.image_size // self.stride)

    def to_json(self) -> dict[str, Any]:
        """Return what determines the network's input, for a manifest."""
        return {
            "name": "class",
            "image_size": self.image_size,
            "stride": self.stride,
            "resize": "shortest, PIL bicubic",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "ClassPreprocess":
        """Return the preprocessing that `to_json` described. Raises UserError for any other description."""
        try:
            size, stride = int(stored["image_size"]), int(stored["stride"])
            made = cls(size, stride, tuple(stored["mean"]), tuple(stored["std"]))  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"preprocessing {dict(stored)!r}: not the 'class' preprocessing ({error})") from None
        if made.to_json() != dict(stored):
            raise UserError(f"preprocessing {dict(stored)!r}: not the 'class' preprocessing of this version")
        return made
