"""Images of a source as they are, with their labels, for tasks whose teacher runs live or that have none."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fmdistill.backbones.preprocess import Preprocess
from fmdistill.cache.dataset import NO_LABEL
from fmdistill.distill.data import Prepared, SplitImages
from fmdistill.images import Encoded, decode


@dataclass(frozen=True)
class Augment:
    """What is drawn anew for each image and epoch: a shift of at most `crop` pixels each way, over black, and a flip.

    The crop is CIFAR's: pad by `crop`, cut the old size out at random.
    """

    crop: int = 0
    flip: bool = False

    def __bool__(self) -> bool:
        return self.crop > 0 or self.flip

    def __call__(self, pixels: Tensor, rng: np.random.Generator) -> Tensor:
        """Return uint8 pixels (3, S, S), shifted and mirrored."""
        top, left = rng.integers(0, 2 * self.crop + 1, 2)
        mirrored = self.flip and rng.random() < 0.5
        if self.crop:
            size = pixels.shape[-1]
            pixels = F.pad(pixels, (self.crop,) * 4)[:, top : top + size, left : left + size]
        return pixels.flip(2) if mirrored else pixels


@dataclass(frozen=True)
class PlainImages(SplitImages):
    """One split of a source's images with their labels, augmented from (seed, epoch, key)."""

    preprocess: Preprocess
    seed: int
    augment: Augment = Augment()

    def prepare(self, name: str, encoded: Encoded) -> Prepared:
        """Return the image with its label beside it."""
        pixels, size = self.preprocess.prepare(decode(encoded.data))
        return Prepared(encoded.key, pixels, size, encoded.label, pixels.nbytes)

    def item(self, epoch: int, shard: int, index: int) -> dict[str, Any]:
        """Return pixels uint8 (3, S, S), size (h, w), label (-1: none) and key."""
        key, pixels, size, label, _ = self.prepared(shard, index)
        if self.augment:
            pixels = self.augment(pixels, np.random.default_rng([self.seed, epoch, zlib.crc32(key.encode())]))
        return {
            "pixels": pixels,
            "sizes": torch.tensor(size),
            "label": torch.tensor(NO_LABEL if label is None else label),
            "keys": key,
            "outputs": {},
        }
