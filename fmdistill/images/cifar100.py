"""Source `cifar100`: the 32x32 images in 100 classes of CIFAR-100 (Krizhevsky 2009), read by torchvision."""

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
    """The 50,000 training images and, for validation, the 10,000 test images; PNG with fine labels 0 to 99.

    They are read from the folder cifar-100-python in `root`. With `download`, torchvision first unpacks it from
    cifar-100-python.tar.gz in `root`, which it downloads if needed (169 MB). torchvision unpickles the files only
    after checking their MD5 sums.
    """

    root: str
    download: bool = False
    shard_size: int = 500

    def __post_init__(self) -> None:
        """Check the settings."""
        check_counts("images", shard_size=self.shard_size)

    @property
    def train(self) -> int:
        """The number of training images. Raises UserError if they are not in `root`."""
        return len(self._arrays("train")[1])

    @property
    def validation(self) -> int:
        """The number of validation images. Raises UserError if they are not in `root`."""
        return len(self._arrays("validation")[1])

    def identity(self) -> dict:
        """Return the settings that determine keys and shards."""
        return {"name": "cifar100", "labels": "fine", "shard_size": self.shard_size}

    def key(self, split: str, index: int) -> str:
        """Return the key of image `index` of a split."""
        return f"cifar100-{split}-{index:05d}"

    def encode(self, split: str, index: int) -> Encoded:
        """Return image `index` of a split, in torchvision's order."""
        pixels, labels = self._arrays(split)
        return Encoded(self.key(split, index), png(PIL.Image.fromarray(pixels[index])), labels[index])

    def labels(self, shard: str) -> list[int | None]:
        """Return the labels of the shard's images, in the order of the keys."""
        split, indices = self._indices(shard)
        labels = self._arrays(split)[1]
        return [labels[index] for index in indices]

    def _arrays(self, split: str) -> tuple[np.ndarray, list[int]]:
        return _load(self.root, split == "train", self.download)


@functools.cache
def _load(root: str, train: bool, download: bool) -> tuple[np.ndarray, list[int]]:
    """Return uint8 (N, 32, 32, 3) RGB images and their fine labels."""
    from torchvision.datasets import CIFAR100  # takes seconds, which other sources should not wait for

    try:
        dataset = CIFAR100(root, train=train, download=download)
    except (OSError, RuntimeError, HTTPException) as error:  # a URLError is an OSError
        if not download:
            raise UserError(
                f"images.root={root}: contains no complete folder {FILES}; set images.download=true to download it, "
                f"or unpack {ARCHIVE} into {root}"
            ) from error
        raise UserError(
            f"images.download=true: {type(error).__name__}: {error}; get {ARCHIVE} another way and put it into "
            f"images.root={root}, and the next run unpacks it"
        ) from error
    return dataset.data, [int(label) for label in dataset.targets]
