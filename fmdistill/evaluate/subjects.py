"""Share between evaluators a student's outputs for images of a cache, their valid tokens, and the images' order."""

# Legend: B images of a batch, C channels or a vector's width, g tokens a side.

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor, nn

from fmdistill.cache import Cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.registry import UserError, suggest
from fmdistill.teachers.family import Preprocess

T = TypeVar("T")

MEAN_OF = 512  # training images whose mean embedding is a floor


@torch.inference_mode()
def embed(model: nn.Module, preprocess: Preprocess, pixels: Tensor, sizes: Tensor) -> Tensor:
    """Return the model's embeddings float32 (B, C, g, g) or (B, D) of a batch's images, on the model's device."""
    device = next(model.parameters(), torch.empty(0)).device
    return forward(model, preprocess.normalize(pixels.to(device), sizes.to(device)))["embedding"].float()


def forward(model: nn.Module, image: Tensor, output: str = "embedding") -> Mapping[str, Tensor]:
    """Return the model's outputs for normalised images (B, 3, S, S); UserError if `output` is not among them."""
    outputs = model(image)
    if isinstance(outputs, Mapping) and output in outputs:
        return outputs
    if output == "embedding" or not isinstance(outputs, Mapping):
        raise UserError(
            f"{type(model).__name__}: a student's forward returns {{'{output}': (B, C, g, g) or (B, D)}}, "
            f"this one a {type(outputs).__name__} without it"
        )
    raise UserError(f"output={output}: {type(model).__name__} makes none.{suggest(output, outputs)}")


def valid_tokens(preprocess: Preprocess, sizes: Tensor, map_BCgg: Tensor) -> Tensor:
    """Return bool (B, g, g): which tokens of a map hold any real pixel; `sizes` are the images' (h, w)."""
    valid_Bgg = preprocess.valid(sizes)
    if valid_Bgg.shape[1:] == map_BCgg.shape[2:]:
        return valid_Bgg.to(map_BCgg.device)
    if not valid_Bgg.all():
        raise UserError(
            f"a map of {list(map_BCgg.shape[2:])} tokens: what is padding is known for {list(valid_Bgg.shape[1:])}; "
            f"judge another output"
        )
    return torch.ones(len(map_BCgg), *map_BCgg.shape[2:], dtype=torch.bool, device=map_BCgg.device)


def pooled(output_BX: Tensor, preprocess: Preprocess, sizes: Tensor) -> Tensor:
    """Return vectors (B, C) as they are, and maps (B, C, g, g) as the mean of their valid tokens."""
    if output_BX.dim() == 2:
        return output_BX
    valid_B1gg = valid_tokens(preprocess, sizes, output_BX)[:, None]
    return (output_BX * valid_B1gg).sum((2, 3)) / valid_B1gg.sum((2, 3))


def mean_embedding(cache: Cache) -> Tensor:
    """Return the mean embedding (C, g, g) of the first MEAN_OF training images, the groups of a mix in turn."""
    data = CachedImages(cache, "train")
    chosen = in_turn(data)[:MEAN_OF]
    total = torch.zeros(cache.shapes["embedding"])
    for shard, index in chosen:
        total += data.outputs([(shard, index)])["embedding"][0]
    return total / max(len(chosen), 1)


def in_turn(data: CachedImages) -> list[tuple[int, int]]:
    """Return (shard, index) of every image, the groups alternating, so that the first N include each group."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for number, shard in enumerate(data.shards):
        groups.setdefault(shard.group, []).extend((number, index) for index in range(len(shard.samples)))
    return list(alternating(groups.values()))


def alternating(groups: Iterable[Sequence[T]]) -> Iterator[T]:
    """Yield the first member of each group, then the second of each, and so on."""
    unfilled = object()
    for members in zip_longest(*groups, fillvalue=unfilled):
        yield from (member for member in members if member is not unfilled)  # type: ignore[misc]
