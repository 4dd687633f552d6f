"""Open images that the user names, with their teacher's outputs, for the pictures of a report."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmdistill import teachers
from fmdistill.cache import Cache
from fmdistill.cache.batch import Batch, collate, sample, with_outputs
from fmdistill.cache.dataset import CachedImages
from fmdistill.cache.prepare import must_prepare
from fmdistill.cache.similarity import WithSimilarity
from fmdistill.images import Encoded
from fmdistill.images.folder import image_paths
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, suggest
from fmdistill.teachers.family import Teacher

FILES = "files"  # the group of images that are not the cache's


def batches(names: Sequence[str], recipe: Recipe, cache: Cache) -> list[tuple[str, Batch]]:
    """Return the group and the batch of one image, with its teacher's outputs, of each image that `names` name.

    A name is the key of a validation image, whose outputs are the cache's, or a file or a folder of images, whose
    outputs the recipe's teacher computes. Raises UserError if an image or the teacher is missing.
    """
    data = CachedImages(cache, "validation")
    places = {key: (i, j) for i, shard in enumerate(data.shards) for j, key in enumerate(shard.keys)}
    paths = {name: list(_paths(name)) for name in names if name not in places}
    for name in names:
        if not paths.get(name, [name]):
            near = suggest(name, places).partition(" Known: ")[0]  # without a list of thousands of keys
            raise UserError(
                f"images={name}: neither a file, a folder, nor the key of a validation image of {cache.root}.{near}"
            )
    teacher = open_teacher(recipe, cache) if paths else None
    if teacher is not None and recipe.cache is not None and recipe.cache.similarity:
        teacher = WithSimilarity(teacher)
    opened = []
    for name in names:
        if name in places:
            opened.append((data.shards[places[name][0]].group, data.batch([places[name]])))
        else:
            assert teacher is not None
            opened += [(FILES, _batch(path, cache, teacher)) for path in paths[name]]
    return opened


def merged(parts: Sequence[Any]) -> Any:
    """Return batches as one batch."""
    if isinstance(parts[0], dict):
        return {key: merged([part[key] for part in parts]) for key in parts[0]}
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else [entry for part in parts for entry in part]


def open_teacher(recipe: Recipe, cache: Cache | None) -> Teacher:
    """Return the recipe's teacher. Raises UserError if it is not on this machine, or is not the one of the cache."""
    if not recipe.teacher:
        raise UserError("the run's recipe names no teacher")
    model = teachers.build(recipe.teacher)
    if cache is not None:
        fingerprint, stored = model.fingerprint(), cache.manifest["teacher"]
        for part in ("weights", "preprocess"):
            if part in stored and fingerprint.get(part) != stored[part]:
                raise UserError(f"the teacher at hand is not the one of {cache.root}: other {part}")
    return model


def _paths(name: str) -> Iterator[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        yield from (path / inside for inside in sorted(image_paths(path, "images")))
    elif path.is_file():
        yield path


def _batch(path: Path, cache: Cache, teacher: Teacher) -> Batch:
    encoded = Encoded(path.name, path.read_bytes())
    batch = collate([sample(must_prepare(cache.images, cache.preprocess, encoded, str(path.parent)))])
    return with_outputs(batch, cache.family, teacher(batch["pixels"], batch["sizes"]))
