"""Images with what is known of them (a label, a caption), and the embeddings that a cached teacher and students give.

Letters: B images of a batch, N images in all, D the shared embedding's width, S the network's input side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmdistill import stop
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill.data import every, to_device
from fmdistill.distill.loader import batches
from fmdistill.evaluate.results import TEACHER
from fmdistill.evaluate.subjects import forward, pooled
from fmdistill.images import DecodeError, Encoded, Images, Shard, captions
from fmdistill.logs import progress
from fmdistill.registry import UserError
from fmdistill.teachers.compute import computing
from fmdistill.teachers.family import Preprocess

DType = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Annotated:
    """One split's images of a source, or those of a cache beside the teacher's embeddings, joined by key."""

    images: Images
    preprocess: Preprocess
    cached: CachedImages | None = None
    pixels: bool = True  # False if only the teacher's embeddings are asked for
    captioned: bool = False  # whether captions are asked for
    split: str = "validation"
    output: str = "embedding"  # what the teacher and the students make that is compared
    pooled: bool = False  # whether maps are averaged over their valid tokens; else they are refused

    @cached_property
    def shards(self) -> list[Shard]:
        """The source's shards of the split in the order of their names."""
        return sorted((s for s in self.images.shards() if s.split == self.split), key=lambda s: s.name)

    @property
    def counts(self) -> tuple[int, ...]:
        """The images of each shard."""
        if self.cached is not None:
            return self.cached.counts
        return tuple(self.images.source.count(s.name) if s.take is None else s.take for s in self.shards)

    def item(self, epoch: int, shard: int, index: int) -> dict[str, Any]:
        """Return key, label or None, and as asked for a list of captions, pixels, sizes and the embedding."""
        encoded = self.cached.encoded(shard, index) if self.cached is not None else self._fetch(shard, index)
        texts = captions(self._name(shard), encoded) if self.captioned else []
        item: dict[str, Any] = {"keys": encoded.key, "labels": encoded.label, "captions": texts}
        if self.cached is not None:
            item[TEACHER] = torch.from_numpy(self.cached.shards[shard].read(index)[self.output])
        if self.pixels:
            try:
                pixels, size = self.preprocess.prepare(self.images.picture(encoded).pixels)
            except DecodeError as error:
                raise UserError(
                    f"image '{encoded.key}': cannot be decoded ({error}); a score over fewer images is another score, "
                    f"so restore it, or take it out on purpose"
                ) from None
            item |= {"pixels": pixels, "sizes": torch.tensor(size)}
        return item

    def _name(self, shard: int) -> str:
        return self.shards[shard].name if self.cached is None else self.cached.shards[shard].name

    def _fetch(self, shard: int, index: int) -> Encoded:
        name = self.shards[shard].name
        if shard not in self._keys:
            self._keys[shard] = self.images.source.keys(name)
        return self.images.source.fetch(name, self._keys[shard][index])

    @cached_property
    def _keys(self) -> dict[int, list[str]]:
        return {}


def first_image(images: Images, protocol: str, split: str = "validation") -> Encoded:
    """Return the first image of the split; UserError that names the `protocol` if there is none."""
    for shard in images.shards():
        if shard.split == split and (keys := images.source.keys(shard.name)):
            return images.source.fetch(shard.name, keys[0])
    raise _no_images(protocol, split)


def _no_images(protocol: str, split: str) -> UserError:
    named = "training" if split == "train" else split
    return UserError(f"{protocol}: there are no {named} images; name some by the protocol's or the recipe's `images`")


@dataclass(frozen=True)
class Embedded:
    """What a protocol compares, image by image: float32 (N, D) embeddings by subject, on the CPU, not normalised."""

    keys: list[str]
    labels: list[int | None]
    captions: list[list[str]]
    embeddings: dict[str, Tensor]


def embed(
    data: Annotated,
    models: Mapping[str, nn.Module],
    device: torch.device,
    title: str,
    batch: int = 64,
    workers: int = 0,
    limit: int | None = None,
    dtype: DType = "fp32",
) -> Embedded:
    """Return the embeddings of the first `limit` images by every model and, from a cache, by its teacher."""
    total = min(sum(data.counts), limit or sum(data.counts))
    if total == 0:
        raise _no_images(title, data.split)
    models = {name: model.to(device).eval() for name, model in models.items()}
    known: dict[str, list[Any]] = {"keys": [], "labels": [], "captions": []}
    parts: dict[str, list[Tensor]] = {name: [] for name in [*models, *([TEACHER] if data.cached else [])]}
    places = list(islice((place for (place,) in every(data, 1)), total))
    groups = [places[start : start + batch] for start in range(0, total, batch)]
    with progress(total=total, description=title, unit="image") as bar:
        for items in stop.between(batches(data, groups, workers)):
            for name, values in known.items():
                values += items[name]
            if data.cached:
                output = items[TEACHER].float()
                parts[TEACHER].append(pooled(output, data.preprocess, items["sizes"]) if data.pooled else output)
            if models:
                pixels, sizes = (to_device(items[name], device) for name in ("pixels", "sizes"))
                image = data.preprocess.normalize(pixels, sizes)
                for name, model in models.items():
                    parts[name].append(_vectors(model, image, sizes, data, dtype))
            bar.update(len(items["keys"]))
    return Embedded(**known, embeddings={name: torch.cat(vectors) for name, vectors in parts.items()})


@torch.inference_mode()
def _vectors(model: nn.Module, image: Tensor, sizes: Tensor, data: Annotated, dtype: DType) -> Tensor:
    with computing(dtype, image.device):
        embedding = forward(model, image, data.output)[data.output].float()
    if data.pooled:
        return pooled(embedding, data.preprocess, sizes).cpu()
    if embedding.ndim != 2:
        raise UserError(
            f"{type(model).__name__}: gives an embedding of {tuple(embedding.shape[1:])} for an image; this protocol "
            f"compares vectors with texts, so judge a student of CLIP"
        )
    return embedding.cpu()
