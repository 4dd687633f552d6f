"""Images of a source with their labels and without a cache, for tasks whose teacher runs live or that have none."""

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fmdistill.cache.batch import Sample, sample
from fmdistill.cache.prepare import PreparedImage, must_prepare
from fmdistill.distill.data import SplitImages
from fmdistill.images import Encoded
from fmdistill.registry import UserError
from fmdistill.teachers.family import Preprocess


@dataclass(frozen=True)
class Augment:
    """Crop or shift each image at random, anew in each epoch, and mirror it with probability one half.

    `crop` is CIFAR's: pad by so many black pixels, then cut the original size out at random. `resized_crop` is
    ImageNet's: a box of the stored image, drawn by `crop_box` and resized bilinearly to the network's size.
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
    """Draw a box (top, left, height, width) with a random share of the area and a random ratio of width to height.

    This is torchvision's RandomResizedCrop: the share is uniform, the ratio uniform in its logarithm; if ten draws do
    not fit, the box is the largest one at the centre with an allowed ratio.
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
    """Raise a UserError if `memory`, GB for prepared images, would be of no use."""
    if augment.resized_crop and memory > 0:
        raise UserError(
            f"train.image_memory={memory}: with task.resized_crop each epoch crops the stored images anew, so no "
            f"prepared image can be kept; set it to 0"
        )


@dataclass(frozen=True)
class PlainImages(SplitImages):
    """One split of a source's images with their labels, augmented from (seed, epoch, key)."""

    preprocess: Preprocess
    seed: int
    augment: Augment = Augment()

    def __post_init__(self) -> None:
        check_memory(self.augment, self.memory)

    def item(self, epoch: int, shard: int, index: int) -> Sample:
        """Return one image without outputs, augmented."""
        if self.augment.resized_crop:
            return sample(self._cropped(epoch, shard, index))
        image = self.prepared(shard, index, self._prepare)
        if self.augment:
            image = image._replace(pixels=self.augment(image.pixels, self._rng(epoch, image.key)))
        return sample(image)

    def _prepare(self, shard: str, encoded: Encoded) -> PreparedImage:
        return must_prepare(self.images, self.preprocess, encoded, shard)

    def _cropped(self, epoch: int, shard: int, index: int) -> PreparedImage:
        name, encoded = self.shards[shard].name, self.encoded(shard, index)
        side, rng = self.preprocess.image_size, self._rng(epoch, encoded.key)
        stored = self.images.decode(encoded, name)
        pixels = self.augment(_resized_crop(stored, side, rng), rng)
        original = (stored.shape[0], stored.shape[1])
        return PreparedImage(encoded.key, name, encoded.label, pixels, (side, side), original)

    def _rng(self, epoch: int, key: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, zlib.crc32(key.encode())])


def _resized_crop(image: np.ndarray, side: int, rng: np.random.Generator) -> Tensor:
    top, left, height, width = crop_box(image.shape[0], image.shape[1], rng)
    part = Image.fromarray(image[top : top + height, left : left + width])
    resized = part.resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
