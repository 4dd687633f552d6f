"""Define sources that number their images: image `index` of a split, and shards that are ranges of numbers."""

import abc
import io
from collections.abc import Iterator

import PIL.Image

from fmdistill.images.source import Encoded
from fmdistill.registry import UserError


class Numbered(abc.ABC):
    """A source of `train` and `validation` images in shards of `shard_size`; a subclass makes each key and image."""

    train: int
    validation: int
    shard_size: int

    @abc.abstractmethod
    def key(self, split: str, index: int) -> str:
        """Return the key of image `index` of a split; it ends in "-" and the number."""

    @abc.abstractmethod
    def encode(self, split: str, index: int) -> Encoded:
        """Return image `index` of a split."""

    def shards(self) -> dict[str, list[str]]:
        """Return the shard names by split."""
        return shard_names(self.train, self.validation, self.shard_size)

    def count(self, shard: str) -> int:
        """Return how many images the shard holds."""
        return len(self._indices(shard)[1])

    def keys(self, shard: str) -> list[str]:
        """Return the shard's keys, in their order."""
        split, indices = self._indices(shard)
        return [self.key(split, index) for index in indices]

    def read(self, shard: str) -> Iterator[Encoded]:
        """Yield the shard's images in order."""
        split, indices = self._indices(shard)
        for index in indices:
            yield self.encode(split, index)

    def fetch(self, shard: str, key: str) -> Encoded:
        """Return one image; KeyError if the shard holds no such key."""
        split, indices = self._indices(shard)
        number = key.rpartition("-")[2]
        if not number.isdecimal() or int(number) not in indices or key != self.key(split, int(number)):
            raise KeyError(key)
        return self.encode(split, int(number))

    def _indices(self, shard: str) -> tuple[str, range]:
        return shard_range(shard, self.train, self.validation, self.shard_size)


def png(image: PIL.Image.Image) -> bytes:
    """Return the image as PNG bytes, stored without compression: they are made on the fly and never written to disk."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def shard_names(train: int, validation: int, shard_size: int) -> dict[str, list[str]]:
    """Return the names of a source's shards by split, `shard_size` images each and the last one fewer."""
    counts = {"train": train, "validation": validation}
    return {split: [f"{split}-{i:03d}" for i in range(-(-n // shard_size))] for split, n in counts.items()}


def shard_range(shard: str, train: int, validation: int, shard_size: int) -> tuple[str, range]:
    """Return the split of `shard` and the indices of its images in the split; KeyError for an unknown shard."""
    if not any(shard in names for names in shard_names(train, validation, shard_size).values()):
        raise KeyError(shard)
    split, _, number = shard.rpartition("-")
    total = train if split == "train" else validation
    first = int(number) * shard_size
    return split, range(first, min(first + shard_size, total))


def check_counts(where: str, **counts: int) -> None:
    """Raise a UserError if a count is negative, or if `size` or `shard_size` is too small to work."""
    least = {"size": 16, "shard_size": 1}
    for name, value in counts.items():
        if value < least.get(name, 0):
            raise UserError(f"{where}.{name}={value}: expected at least {least.get(name, 0)}")
