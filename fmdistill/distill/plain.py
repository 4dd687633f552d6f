"""Images of a source as they are, with their labels, for tasks whose teacher runs live or that have none."""

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fmdistill.cache.dataset import NO_LABEL
from fmdistill.distill.data import Prepared, SplitImages
from fmdistill.images import Encoded
from fmdistill.registry import UserError
from fmdistill.teachers.family import Preprocess


@dataclass(frozen=True)
class Augment:
    """What is drawn anew for each image and epoch: a part of the image or a shift, and a flip of every other one.

    `crop` is CIFAR's: pad by so many black pixels, cut the old size out at random. `resized_crop` is ImageNet's: a box
    of the image as it is stored, as `crop_box` draws it, bilinearly resized to the network's size.
    """

    crop: int = 0
    flip: bool = False
    resized_crop: bool = False

    def __post_init__(self) -> None:
        if self.crop > 0 and self.resized_crop:
            raise UserError(f"task.crop={self.crop}: with task.resized_crop a part is cut out already; set it to 0")

    def __bool__(self) -> bool:
        return self.crop > 0 or self.flip or self.resized_crop

    def __call__(self, pixels: Tensor, rng: np.random.Generator) -> Tensor:
        """Return uint8 pixels (3, S, S), shifted and mirrored."""
        top, left = rng.integers(0, 2 * self.crop + 1, 2)
        mirrored = self.flip and rng.random() < 0.5
        if self.crop:
            size = pixels.shape[-1]
            pixels = F.pad(pixels, (self.crop,) * 4)[:, top : top + size, left : left + size]
        return pixels.flip(2) if mirrored else pixels


def crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a box of a random share of the area and a random ratio of width to height.

    The rule of torchvision's RandomResizedCrop: the share is uniform, the ratio in its logarithm; ten draws that do not
    fit give the largest box at the centre whose ratio is allowed.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        drawn = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * drawn)), round(math.sqrt(area / drawn))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def check_memory(augment: Augment, memory: float) -> None:
    """Raise a UserError if `memory`, GB of prepared images, would be kept for nothing."""
    if augment.resized_crop and memory > 0:
        raise UserError(
            f"train.image_memory={memory}: with task.resized_crop each epoch cuts its images anew from those that are "
            f"stored, so there is nothing to keep; set it to 0"
        )


@dataclass(frozen=True)
class PlainImages(SplitImages):
    """One split of a source's images with their labels, augmented from (seed, epoch, key)."""

    preprocess: Preprocess
    seed: int
    augment: Augment = Augment()

    def __post_init__(self) -> None:
        check_memory(self.augment, self.memory)

    def prepare(self, name: str, encoded: Encoded) -> Prepared:
        """Return the image with its label beside it."""
        pixels, size = self.preprocess.prepare(self.images.decode(encoded, name))
        return Prepared(encoded.key, pixels, size, encoded.label, pixels.nbytes)

    def item(self, epoch: int, shard: int, index: int) -> dict[str, Any]:
        """Return pixels uint8 (3, S, S), size (h, w), label (-1: none) and key."""
        if self.augment.resized_crop:
            name, encoded = self.encoded(shard, index)
            side, rng = self.preprocess.image_size, self._rng(epoch, encoded.key)
            pixels = self.augment(_resized_crop(self.images.decode(encoded, name), side, rng), rng)
            key, size, label = encoded.key, (side, side), encoded.label
        else:
            key, pixels, size, label, _ = self.prepared(shard, index)
            pixels = self.augment(pixels, self._rng(epoch, key)) if self.augment else pixels
        label = NO_LABEL if label is None else label
        return {
            "pixels": pixels,
            "sizes": torch.tensor(size),
            "label": torch.tensor(label),
            "label_values": label,  # once more, since it stays on the CPU
            "keys": key,
            "outputs": {},
        }

    def _rng(self, epoch: int, key: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, zlib.crc32(key.encode())])


def _resized_crop(image: np.ndarray, side: int, rng: np.random.Generator) -> Tensor:
    top, left, height, width = crop_box(image.shape[0], image.shape[1], rng)
    part = Image.fromarray(image[top : top + height, left : left + width])
    resized = part.resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
