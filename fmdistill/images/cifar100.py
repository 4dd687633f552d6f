"""Source `cifar100`: CIFAR-100 (Krizhevsky 2009) as torchvision reads it, 32x32 images of 100 classes."""

import functools
from dataclasses import dataclass
from http.client import HTTPException

import numpy as np
import PIL.Image

from fmdistill.images.numbered import Numbered, check_counts, png
from fmdistill.images.source import Encoded
from fmdistill.registry import UserError

FILES, ARCHIVE = "cifar-100-python", "cifar-100-python.tar.gz"


@dataclass(frozen=True)
class Cifar100(Numbered):
    """The 50,000 training and 10,000 test images below `root`, the latter as validation; PNG with fine labels 0 to 99.

    `root` holds the folder cifar-100-python; with `download` torchvision makes it first, from cifar-100-python.tar.gz
    in `root` or from the network (169 MB). torchvision unpickles the files only after their MD5 sums agree.
    """

    root: str
    download: bool = False
    shard_size: int = 500

    def __post_init__(self) -> None:
        """Check the settings."""
        check_counts("images", shard_size=self.shard_size)

    @property
    def train(self) -> int:
        """How many images train. UserError where `root` does not hold them."""
        return len(self._held("train")[1])

    @property
    def validation(self) -> int:
        """How many images validate. UserError where `root` does not hold them."""
        return len(self._held("validation")[1])

    def identity(self) -> dict:
        """Return what decides keys and shards."""
        return {"name": "cifar100", "labels": "fine", "shard_size": self.shard_size}

    def key(self, split: str, index: int) -> str:
        """Return the key of image `index` of a split."""
        return f"cifar100-{split}-{index:05d}"

    def encode(self, split: str, index: int) -> Encoded:
        """Return image `index` of a split, in torchvision's order."""
        pixels, labels = self._held(split)
        return Encoded(self.key(split, index), png(PIL.Image.fromarray(pixels[index])), labels[index])

    def labels(self, shard: str) -> list[int | None]:
        """Return the labels of the shard's images, in the order of the keys."""
        split, indices = self._indices(shard)
        held = self._held(split)[1]
        return [held[index] for index in indices]

    def _held(self, split: str) -> tuple[np.ndarray, list[int]]:
        return _load(self.root, split == "train", self.download)


@functools.cache
def _load(root: str, train: bool, download: bool) -> tuple[np.ndarray, list[int]]:
    """Return uint8 (N, 32, 32, 3) RGB images and their fine labels."""
    from torchvision.datasets import CIFAR100  # seconds that other sources need not wait

    try:
        held = CIFAR100(root, train=train, download=download)
    except (OSError, RuntimeError, HTTPException) as error:  # a URLError is an OSError
        if not download:
            raise UserError(
                f"images.root={root}: holds no whole folder {FILES}; set images.download=true to download it there, "
                f"or unpack {ARCHIVE} there"
            ) from error
        raise UserError(
            f"images.download=true: {type(error).__name__}: {error}; get {ARCHIVE} another way and put it into "
            f"images.root={root}, where it is unpacked"
        ) from error
    return held.data, [int(label) for label in held.targets]
