"""Read one split of a cache: images joined by key to their teacher's outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fmdistill.cache.batch import (
    Batch,
    BufferPool,
    Place,
    Sample,
    StoredOutputs,
    decode_outputs,
    fill,
    read_outputs,
    sample,
    to_device,
    with_outputs,
)
from fmdistill.cache.prepare import PreparedImage, must_prepare
from fmdistill.cache.reader import Cache, ShardReader
from fmdistill.cache.writer import image_hash
from fmdistill.images import Encoded, Images
from fmdistill.images.memory import ImageMemory
from fmdistill.registry import UserError


@dataclass(frozen=True)
class CachedImages:
    """Images of a cache's split with the teacher's outputs; each process holds up to `memory` GB of prepared images.

    A loader gives batches with the outputs as they are stored; `decode` turns these into float32 on the batch's device.
    """

    cache: Cache
    split: str
    memory: float = 0.0

    @property
    def shards(self) -> list[ShardReader]:
        """The split's shards."""
        return self.cache.shards[self.split]

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of images of each shard."""
        return tuple(len(shard.samples) for shard in self.shards)

    def item(self, epoch: int, shard: int, index: int) -> Sample:
        """Return one image without its outputs."""
        return sample(self._memory.get((shard, index), lambda: self._prepare(shard, index)))

    def read_batch(self, places: Sequence[Place]) -> dict[str, StoredOutputs]:
        """Return the outputs of `places` as they are stored."""
        stored = self._read([(shard, index) for _, shard, index in places])
        return {"stored": {**stored, "epochs": [epoch for epoch, _, _ in places]}}

    def decode(self, batch: Batch) -> Batch:
        """Return a loaded batch with its stored outputs decoded, on the device that it is on."""
        assert "stored" in batch, "this batch was not read from a cache"
        return with_outputs(batch, self.cache.family, decode_outputs(batch["stored"], self.cache.shapes))

    def batch(self, places: Sequence[tuple[int, int]], device: torch.device | None = None) -> Batch:
        """Return the images at (shard, index) with their outputs, read in this process and decoded on `device`."""
        batch = fill(self, [(0, shard, index) for shard, index in places])
        return self.decode(batch if device is None else to_device(batch, device))

    def outputs(self, places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Return the outputs of the images at (shard, index) without the images: float32 (B, ...) by name."""
        return decode_outputs(self._read(places), self.cache.shapes)

    def encoded(self, shard: int, index: int) -> Encoded:
        """Return the image as `fetch_image` does."""
        return fetch_image(self.cache.images, self.shards[shard], index)

    def _read(self, places: Sequence[tuple[int, int]]) -> StoredOutputs:
        return read_outputs([(self.shards[shard], index) for shard, index in places], self._pool)

    def _prepare(self, shard: int, index: int) -> PreparedImage:
        reader = self.shards[shard]
        encoded = self.encoded(shard, index)
        image = must_prepare(self.cache.images, self.cache.preprocess, encoded, reader.name)
        return image._replace(label=reader.samples[index].get("label"))  # the label that the cache was made with

    @cached_property
    def _memory(self) -> ImageMemory[PreparedImage]:
        return ImageMemory(self.memory)

    @cached_property
    def _pool(self) -> BufferPool:
        return BufferPool()


def fetch_image(images: Images, shard: ShardReader, index: int) -> Encoded:
    """Return a cached image as its source stores it; UserError if it is missing or not the one that was cached."""
    record = shard.samples[index]
    try:
        encoded = images.source.fetch(shard.name, record["key"])
    except (KeyError, FileNotFoundError):
        raise UserError(
            f"{shard.name}: image '{record['key']}' is cached but not among the images; is images.root right?"
        ) from None
    if image_hash(encoded.data) != record["image"]:
        raise UserError(
            f"{shard.name}: image '{record['key']}' is not the one that the teacher saw; restore it, "
            f"or delete {shard.address} and run `fmdistill cache` again"
        )
    return encoded
