"""Data: what a task trains on, item by item."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fmdistill.images import Encoded, Images, Shard
from fmdistill.images.kept import Kept

Place = tuple[int, int, int]  # (epoch, shard, index)


class Data(Protocol):
    """Samples of one split, in shards of a fixed order."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the samples of each shard."""
        ...

    def item(self, epoch: int, shard: int, index: int) -> dict[str, Any]:
        """Return one sample as tensors and texts; anything random draws from (seed, epoch, key)."""
        ...


@runtime_checkable
class Together(Protocol):
    """Data of which a part is read for a whole batch at once, into the tensors that training gets.

    Threads of the training process read it: through a worker process, reading would take several times as long.
    """

    def together(self, places: Sequence[Place]) -> dict[str, Any]:
        """Return that part of the batch of `places`; `item` gives the rest. Threads call it."""
        ...


class Prepared(NamedTuple):
    """An image ready for training: pixels uint8 (3, S, S), size (h, w), and what the task has beside it."""

    key: str
    pixels: Tensor
    size: tuple[int, int]
    beside: Any
    nbytes: int


@dataclass(frozen=True)
class SplitImages:
    """One split of a source's images, found by the numbers of shard and image; a process keeps `memory` GB of them."""

    images: Images
    split: str
    memory: float = field(default=0.0, kw_only=True)

    @cached_property
    def shards(self) -> list[Shard]:
        """The split's shards in the order of their names."""
        return sorted((s for s in self.images.shards() if s.split == self.split), key=lambda s: s.name)

    @property
    def counts(self) -> tuple[int, ...]:
        """The samples of each shard."""
        return tuple(self.images.source.count(s.name) if s.take is None else s.take for s in self.shards)

    @cached_property
    def keys(self) -> dict[int, list[str]]:
        """The keys of each shard, filled as shards are first used."""
        return {}

    @cached_property
    def kept(self) -> Kept[Prepared]:
        """What this process need not prepare again."""
        return Kept(self.memory, lambda prepared: prepared.nbytes)

    def prepared(self, shard: int, index: int) -> Prepared:
        """Return the image ready for training, prepared now or kept."""
        return self.kept.get((shard, index), lambda: self.prepare(*self.encoded(shard, index)))

    def prepare(self, name: str, encoded: Encoded) -> Prepared:
        """Return the image of shard `name` ready for training. UserError where it lacks what the task needs."""
        raise NotImplementedError

    def encoded(self, shard: int, index: int) -> tuple[str, Encoded]:
        """Return the shard's name and the image as stored."""
        name = self.shards[shard].name
        if shard not in self.keys:
            self.keys[shard] = self.images.source.keys(name)
        return name, self.images.source.fetch(name, self.keys[shard][index])


def every(data: Data, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[list[Place]]:
    """Yield places such that all processes together see every sample exactly once, in order."""
    places = [(0, shard, index) for shard, count in enumerate(data.counts) for index in range(count)]
    ours = places[rank::world]
    for start in range(0, len(ours), batch_size):
        yield ours[start : start + batch_size]


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on `device`."""
    return changed(batch, lambda tensor: tensor.to(device, non_blocking=True))


def changed(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return the batch with each of its tensors as `change` returns it."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {key: changed(value, change) for key, value in batch.items()}
    return batch
