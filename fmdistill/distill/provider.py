"""Provide a task's images with their teacher's outputs: from a cache, from a live teacher, or without a teacher."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmdistill import teachers
from fmdistill.backbones.clip import stored_scale
from fmdistill.cache import captions, finished, open_cache
from fmdistill.cache.batch import NO_LABEL, Batch, Data, with_outputs
from fmdistill.cache.dataset import CachedImages
from fmdistill.cache.reader import Cache
from fmdistill.distill.objective import check_trimmed
from fmdistill.distill.plain import Augment, PlainImages, check_memory
from fmdistill.distill.rectifiers import Priors
from fmdistill.distill.train import Complete
from fmdistill.images import build as build_images
from fmdistill.images.source import SPLITS
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.teachers.family import Preprocess
from fmdistill.teachers.output import Output

CHUNK = 256  # images whose outputs are read at once


@dataclass(frozen=True)
class Provider:
    """Training and validation images, and what adds the teacher's outputs to their batches.

    `outputs` describes the teacher's for one image, by their names in a batch. `complete` adds them to a batch that is
    on its device, by decoding what a cache stores or by running a live teacher; None without a teacher. `source` names
    in errors where they come from.
    """

    preprocess: Preprocess
    outputs: dict[str, Output]
    train: Data
    validation: Data
    complete: Complete | None
    source: str
    labels: Callable[[], np.ndarray]  # of the training images, int (N,), NO_LABEL for none
    vectors: Callable[[str], np.ndarray]  # a teacher's output for them, (N, D)
    cache: Cache | None = None  # the teacher's, with its statistics

    def logit_scale(self) -> float | None:
        """Return the factor of the teacher's cosines between images and texts; None if it is no cached CLIP."""
        return stored_scale(self.cache.root) if self.cache is not None and self.cache.family == "clip" else None


def build(recipe: Recipe, own: Preprocess | None = None, augment: Augment | None = None) -> Provider:
    """Return the recipe's provider; `own` prepares images if the recipe has no teacher."""
    if recipe.teacher is None:
        if own is None:
            raise UserError(f"task.name={recipe.task['name']}: learns from a teacher; the recipe needs one")
        return _plain(recipe, own, {}, augment or Augment(), None, "no teacher")
    check(recipe, augment or Augment())
    if not finished.is_live(recipe.teacher):
        return _cached(recipe)
    with torch.random.fork_rng(devices=[]):  # so that a seed draws the same student as with a cached teacher
        model = teachers.build(recipe.teacher)
    outputs = with_prefix(model.family, model.outputs)

    def complete(batch: Batch) -> Batch:
        device, made = batch["pixels"].device, model(batch["pixels"], batch["sizes"])
        # Cloned, since autograd saves no tensor of inference mode, and a learned distance may need the teacher's.
        return with_outputs(batch, model.family, {name: value.to(device).clone() for name, value in made.items()})

    return _plain(recipe, model.preprocess, outputs, augment or Augment(), complete, "the live teacher")


def with_prefix(family: str, outputs: Mapping[str, Output]) -> dict[str, Output]:
    """Return a teacher's outputs by their names in a batch, such as "sam.embedding"."""
    prefixed = {}
    for name, output in outputs.items():
        of = None if output.of is None else f"{family}.{output.of}"
        prefixed[f"{family}.{name}"] = Output(output.shape, output.tokens, of)
    return prefixed


def check(recipe: Recipe, augment: Augment) -> None:
    """Raise a UserError if `augment` does not fit the recipe's teacher or `train.image_memory`."""
    if augment and recipe.teacher is not None and not finished.is_live(recipe.teacher):
        raise UserError(
            "task.crop, .flip, .resized_crop: a cached teacher saw the images as they are; add teacher.live=true and "
            "cache=null, so that it sees what the student sees, or leave the augmentation out"
        )
    check_memory(augment, recipe.train.image_memory)


def priors(provider: Provider, classes: int) -> Priors:
    """Return how often each class occurs among the training images; UserError if an image has no such label."""
    label_N = provider.labels()
    outside = np.flatnonzero((label_N < 0) | (label_N >= classes))
    if len(outside):
        shard = int(np.searchsorted(np.cumsum(provider.train.counts), outside[0], side="right"))
        key = provider.train.item(0, shard, int(outside[0] - sum(provider.train.counts[:shard])))["keys"]
        label = int(label_N[outside[0]])
        raise UserError(
            f"rectify: goes by the classes' frequencies, so each training image needs a label from 0 to {classes - 1}; "
            f"'{key}' has {'none' if label < 0 else label}"
        )
    counts_K = torch.from_numpy(np.bincount(label_N, minlength=classes))

    def means(output: str) -> Tensor:
        vectors_ND = torch.from_numpy(provider.vectors(output)).float()
        sums_KD = torch.zeros(classes, vectors_ND.shape[1]).index_add_(0, torch.from_numpy(label_N), vectors_ND)
        return sums_KD / counts_K[:, None]

    return Priors(counts_K, means)


def _cached(recipe: Recipe) -> Provider:
    if recipe.cache is not None and recipe.cache.trim:
        check_trimmed(recipe.objective)
    cache = open_cache(recipe)
    train = CachedImages(cache, "train", recipe.train.image_memory)

    def labels() -> np.ndarray:
        return np.array([sample.get("label", NO_LABEL) for shard in train.shards for sample in shard.samples])

    def vectors(output: str) -> np.ndarray:
        name = output.removeprefix(f"{cache.family}.")
        places = [(shard, index) for shard, count in enumerate(train.counts) for index in range(count)]
        chunks = [places[start : start + CHUNK] for start in range(0, len(places), CHUNK)]
        return np.concatenate([train.outputs(chunk)[name].numpy().copy() for chunk in chunks])  # frees its buffer

    def complete(batch: Batch) -> Batch:
        assert "stored" in batch, "this batch was not read from a cache"
        places = [(recipe.seed, *place) for place in zip(batch["stored"]["epochs"], batch["keys"], strict=True)]
        decoded = train.decode(batch)
        decoded["outputs"] = captions.draw(decoded["outputs"], cache.family, places)
        return decoded

    outputs = with_prefix(cache.family, captions.drawn_outputs(cache.outputs))
    validation = CachedImages(cache, "validation")
    return Provider(cache.preprocess, outputs, train, validation, complete, "the cache", labels, vectors, cache)


def _plain(
    recipe: Recipe,
    preprocess: Preprocess,
    outputs: dict[str, Output],
    augment: Augment,
    complete: Complete | None,
    source: str,
) -> Provider:
    images = build_images(recipe.images)
    train, validation = (
        PlainImages(images, split, preprocess, recipe.seed, drawn, memory=memory)
        for split, drawn, memory in zip(SPLITS, (augment, Augment()), (recipe.train.image_memory, 0.0), strict=True)
    )

    def labels() -> np.ndarray:
        known = [label for shard in train.shards for label in images.labels(shard)]
        return np.array([NO_LABEL if label is None else label for label in known])

    def vectors(output: str) -> np.ndarray:
        raise UserError(f"rectify: the classes' means of {output} come from a cache; leave teacher.live out")

    return Provider(preprocess, outputs, train, validation, complete, source, labels, vectors)
