"""Read one split of a source's images by number, and list the places of a whole split."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from fmdistill.cache.batch import Data, Place
from fmdistill.cache.prepare import PreparedImage
from fmdistill.images import Encoded, Images, Shard
from fmdistill.images.memory import ImageMemory


@dataclass(frozen=True)
class SplitImages:
    """One split of a source's images by numbers of shard and image; a process holds up to `memory` GB of them."""

    images: Images
    split: str
    memory: float = field(default=0.0, kw_only=True)

    @cached_property
    def shards(self) -> list[Shard]:
        """The split's shards in the order of their names."""
        return sorted((s for s in self.images.shards() if s.split == self.split), key=lambda s: s.name)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of images of each shard."""
        return tuple(self.images.source.count(s.name) if s.take is None else s.take for s in self.shards)

    def encoded(self, shard: int, index: int) -> Encoded:
        """Return the image as its source stores it."""
        name = self.shards[shard].name
        if shard not in self._keys:
            self._keys[shard] = self.images.source.keys(name)
        return self.images.source.fetch(name, self._keys[shard][index])

    def prepared(self, shard: int, index: int, prepare: Callable[[str, Encoded], PreparedImage]) -> PreparedImage:
        """Return the image from memory, or as `prepare` makes it from its shard's name and what is stored."""
        name = self.shards[shard].name
        return self._memory.get((shard, index), lambda: prepare(name, self.encoded(shard, index)))

    @cached_property
    def _keys(self) -> dict[int, list[str]]:
        return {}  # by shard, filled as shards are first used

    @cached_property
    def _memory(self) -> ImageMemory[PreparedImage]:
        return ImageMemory(self.memory)


def every(data: Data, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[list[Place]]:
    """Yield the places of process `rank`, in order; all `world` processes together see every image exactly once."""
    places = [(0, shard, index) for shard, count in enumerate(data.counts) for index in range(count)]
    own = places[rank::world]
    for start in range(0, len(own), batch_size):
        yield own[start : start + batch_size]
