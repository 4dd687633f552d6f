"""What generated sources have in common: an image is a number of its split, a shard a range of numbers."""

import abc
from collections.abc import Iterator

from fmdistill.images.photos import shard_names, shard_range
from fmdistill.images.source import Encoded


class Generated(abc.ABC):
    """Lists `train` and `validation` images in shards of `shard_size`; a subclass names image `index` and makes it."""

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
        """Return one image; KeyError where the shard holds no such key."""
        split, indices = self._indices(shard)
        number = key.rpartition("-")[2]
        if not number.isdecimal() or int(number) not in indices or key != self.key(split, int(number)):
            raise KeyError(key)
        return self.encode(split, int(number))

    def _indices(self, shard: str) -> tuple[str, range]:
        return shard_range(shard, self.train, self.validation, self.shard_size)
