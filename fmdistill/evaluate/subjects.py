"""What evaluators share: a student's outputs for images of a cache, their valid tokens, and the order of the images."""

# Legend: B images of a batch, C channels or a vector's width, g tokens a side.

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fmdistill.cache import Cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.registry import UserError, suggest
from fmdistill.teachers.family import Preprocess

MEAN_OF = 512  # training images whose mean embedding is a floor


@torch.inference_mode()
def embed(model: nn.Module, preprocess: Preprocess, item: dict) -> Tensor:
    """Return the model's embedding (C, g, g) of one item of the cache, on the model's device."""
    return outputs(model, preprocess, item)["embedding"][0].float()


def outputs(model: nn.Module, preprocess: Preprocess, item: dict) -> Mapping[str, Tensor]:
    """Return what the model makes of one item of the cache, on the model's device; UserError without an embedding."""
    device = next(model.parameters(), torch.empty(0)).device
    pixels, sizes = item["pixels"][None].to(device), item["sizes"][None].to(device)
    return forward(model, preprocess.normalize(pixels, sizes))


def forward(model: nn.Module, image: Tensor, output: str = "embedding") -> Mapping[str, Tensor]:
    """Return what the model makes of normalised images (B, 3, S, S); UserError without `output`."""
    made = model(image)
    if isinstance(made, Mapping) and output in made:
        return made
    if output == "embedding" or not isinstance(made, Mapping):
        raise UserError(
            f"{type(model).__name__}: a student's forward returns {{'{output}': (B, C, g, g) or (B, D)}}, "
            f"this one a {type(made).__name__} without it"
        )
    raise UserError(f"output={output}: {type(model).__name__} makes none.{suggest(output, made)}")


def valid_tokens(preprocess: Preprocess, sizes: Tensor, map_BCgg: Tensor) -> Tensor:
    """Return which tokens of a map hold any real pixel, bool (B, g, g); `sizes` are the images' (h, w)."""
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
    """Return the mean embedding (C, g, g) of training images, every group in turn, position by position."""
    data = CachedImages(cache, "train")
    chosen = in_turn(data)[:MEAN_OF]
    total = torch.zeros(cache.shapes["embedding"])
    for shard, index in chosen:
        total += torch.from_numpy(data.shards[shard].read(index)["embedding"])
    return total / max(len(chosen), 1)


def in_turn(data: CachedImages) -> list[tuple[int, int]]:
    """Return (shard, index) of every sample, the groups alternating, so that the first N hold some of each."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for number, shard in enumerate(data.shards):
        groups.setdefault(shard.group, []).extend((number, index) for index in range(len(shard.samples)))
    longest = max(map(len, groups.values()), default=0)
    return [places[i] for i in range(longest) for places in groups.values() if i < len(places)]
