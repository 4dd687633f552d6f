"""Images with exact object masks and prompts drawn from them, for the task `promptable`."""

import io
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import PIL.Image
import torch

from fmdistill.backbones.sam import SamPreprocess
from fmdistill.distill.promptable import sample_prompts
from fmdistill.images import Images, Shard, decode
from fmdistill.registry import UserError

COLUMN = "labels.png"


@dataclass(frozen=True)
class LabelledImages:
    """One split of a source whose images carry a `labels.png` column: object ids per pixel, 0 = background."""

    images: Images
    split: str
    preprocess: SamPreprocess
    prompts: int
    seed: int

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

    def item(self, epoch: int, shard: int, index: int) -> dict[str, Any]:
        """Return pixels, size, labels int32 (S, S) with -1 for padding, and prompts drawn from (seed, epoch, key)."""
        name = self.shards[shard].name
        if shard not in self.keys:
            self.keys[shard] = self.images.source.keys(name)
        key = self.keys[shard][index]
        encoded = self.images.source.fetch(name, key)
        if COLUMN not in encoded.extra:
            raise UserError(
                f"{name}: image '{key}' has no {COLUMN}; task promptable needs exact masks, as `scenes` has"
            )
        pixels, (h, w) = self.preprocess.prepare(decode(encoded.data))
        with PIL.Image.open(io.BytesIO(encoded.extra[COLUMN])) as picture:
            mask = np.asarray(picture.resize((w, h), PIL.Image.Resampling.NEAREST)).astype(np.int32)
        labels = np.full((self.preprocess.image_size,) * 2, -1, np.int32)
        labels[:h, :w] = mask
        rng = np.random.default_rng([self.seed, epoch, zlib.crc32(key.encode())])
        points, target, boxes, use_box = sample_prompts(labels, rng, self.prompts)
        return {
            "pixels": pixels,
            "sizes": torch.tensor((h, w)),
            "labels": torch.from_numpy(labels),
            "points": torch.from_numpy(points),
            "target": torch.from_numpy(np.asarray(target)),
            "boxes": torch.from_numpy(boxes),
            "use_box": torch.from_numpy(np.asarray(use_box)),
            "keys": key,
        }
