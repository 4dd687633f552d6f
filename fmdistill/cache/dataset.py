"""Images joined to their teacher's outputs by key, one split of a cache."""

from dataclasses import dataclass
from typing import Any

import torch

from fmdistill.cache.reader import Cache, ShardReader
from fmdistill.cache.writer import image_hash
from fmdistill.images import DecodeError, Encoded, decode
from fmdistill.registry import UserError


@dataclass(frozen=True)
class CachedImages:
    """Images with their teacher's outputs, from a cache."""

    cache: Cache
    split: str

    @property
    def shards(self) -> list[ShardReader]:
        """The split's shards."""
        return self.cache.shards[self.split]

    @property
    def counts(self) -> tuple[int, ...]:
        """The samples of each shard."""
        return tuple(len(shard.samples) for shard in self.shards)

    def item(self, epoch: int, shard: int, index: int) -> dict[str, Any]:
        """Return pixels uint8 (3, S, S), size (h, w), original (H, W), key, shard name and outputs."""
        reader = self.shards[shard]
        sample = reader.samples[index]
        encoded = self.encoded(shard, index)
        try:
            pixels, size = self.cache.preprocess.prepare(decode(encoded.data))
        except DecodeError as error:
            raise UserError(f"{reader.name}: image '{sample['key']}' cannot be decoded any more: {error}") from None
        outputs = {f"{self.cache.family}.{k}": torch.from_numpy(v) for k, v in reader.read(index).items()}
        return {
            "pixels": pixels,
            "sizes": torch.tensor(size),
            "originals": torch.tensor(sample["original"]),
            "keys": sample["key"],
            "shards": reader.name,
            "outputs": outputs,
        }

    def encoded(self, shard: int, index: int) -> Encoded:
        """Return the image as stored. UserError where it is gone, or is no longer the one that the teacher saw."""
        reader = self.shards[shard]
        sample = reader.samples[index]
        try:
            encoded = self.cache.images.source.fetch(reader.name, sample["key"])
        except (KeyError, FileNotFoundError):
            raise UserError(
                f"{reader.name}: image '{sample['key']}' is cached but not among the images; is images.root right?"
            ) from None
        if image_hash(encoded.data) != sample["image"]:
            raise UserError(
                f"{reader.name}: image '{sample['key']}' is not the one that the teacher saw; restore it, "
                f"or delete {reader.path} and run `fmdistill cache` again"
            )
        return encoded
