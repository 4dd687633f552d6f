"""Images joined to their teacher's outputs by key, one split of a cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fmdistill.cache import batch
from fmdistill.cache.reader import Cache, ShardReader
from fmdistill.cache.writer import image_hash
from fmdistill.images import DecodeError, Encoded, Images
from fmdistill.images.kept import Kept
from fmdistill.registry import UserError

NO_LABEL = -1


@dataclass(frozen=True)
class CachedImages:
    """Images with their teacher's outputs, from a cache; a process keeps the first `memory` GB that it prepares."""

    cache: Cache
    split: str
    memory: float = 0.0

    @property
    def shards(self) -> list[ShardReader]:
        """The split's shards."""
        return self.cache.shards[self.split]

    @property
    def counts(self) -> tuple[int, ...]:
        """The samples of each shard."""
        return tuple(len(shard.samples) for shard in self.shards)

    def item(self, epoch: int, shard: int, index: int) -> dict[str, Any]:
        """Return what `image` does, and the float32 outputs by their names, such as "sam.embedding"."""
        found = self.shards[shard].read(index).items()
        outputs = {f"{self.cache.family}.{name}": torch.from_numpy(value) for name, value in found}
        return {**self.image(shard, index), "outputs": outputs}

    def image(self, shard: int, index: int) -> dict[str, Any]:
        """Return pixels uint8 (3, S, S), size (h, w), original (H, W), label or -1, key and shard name."""
        reader = self.shards[shard]
        sample = reader.samples[index]
        label = sample.get("label", NO_LABEL)
        pixels, size = self._kept.get((shard, index), lambda: self._prepare(shard, index))
        return {
            "pixels": pixels,
            "sizes": torch.tensor(size),
            "originals": torch.tensor(sample["original"]),
            "label": torch.tensor(label),
            "label_values": label,  # once more, since it stays on the CPU
            "keys": sample["key"],
            "shards": reader.name,
        }

    @cached_property
    def _kept(self) -> Kept[tuple[Tensor, tuple[int, int]]]:
        return Kept(self.memory, lambda prepared: prepared[0].nbytes)

    def _prepare(self, shard: int, index: int) -> tuple[Tensor, tuple[int, int]]:
        try:
            return self.cache.preprocess.prepare(self.cache.images.picture(self.encoded(shard, index)).pixels)
        except DecodeError as error:
            reader = self.shards[shard]
            key = reader.samples[index]["key"]
            raise UserError(f"{reader.name}: image '{key}' cannot be decoded any more: {error}") from None

    def encoded(self, shard: int, index: int) -> Encoded:
        """Return the image as `fetch_image` does."""
        return fetch_image(self.cache.images, self.shards[shard], index)


@dataclass(frozen=True)
class StoredImages:
    """Cached images for a loader: their outputs stay as they are stored until `decoded` has them on the device."""

    images: CachedImages

    @property
    def counts(self) -> tuple[int, ...]:
        """The samples of each shard."""
        return self.images.counts

    def item(self, epoch: int, shard: int, index: int) -> dict[str, Any]:
        """Return one image without its outputs, as `CachedImages.image`."""
        return self.images.image(shard, index)

    def together(self, places: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
        """Return what `batch.read` does of all places."""
        return batch.read([(self.images.shards[shard], index) for _, shard, index in places], self._pool)

    @cached_property
    def _pool(self) -> batch.BufferPool:
        return batch.BufferPool()


def fetch_image(images: Images, shard: ShardReader, index: int) -> Encoded:
    """Return a cached image as it is stored. UserError if it is missing or is not the one that the teacher saw."""
    sample = shard.samples[index]
    try:
        encoded = images.source.fetch(shard.name, sample["key"])
    except (KeyError, FileNotFoundError):
        raise UserError(
            f"{shard.name}: image '{sample['key']}' is cached but not among the images; is images.root right?"
        ) from None
    if image_hash(encoded.data) != sample["image"]:
        raise UserError(
            f"{shard.name}: image '{sample['key']}' is not the one that the teacher saw; restore it, "
            f"or delete {shard.address} and run `fmdistill cache` again"
        )
    return encoded


def decoded(cache: Cache, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch of `StoredImages` with the float32 "outputs" in the place of what is stored, on its device."""
    found = batch.decoded(loaded, cache.shapes)
    rest = {key: value for key, value in loaded.items() if key not in ("codecs", "stored", "shapes")}
    return {**rest, "outputs": {f"{cache.family}.{name}": value for name, value in found.items()}}
