"""Run the cache stage: find what is missing, have an executor run the teacher over it, and check what is stored."""

import functools
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fmdistill import recipe as recipes
from fmdistill.cache import executors, manifest, similarity, teacher, unchanged
from fmdistill.cache.bucket import behind, local
from fmdistill.cache.codec import SIMILARITY, by_split, stacked
from fmdistill.cache.executors.processes import Plan
from fmdistill.cache.finished import asked, cache_of, complete, finished, missing, settled
from fmdistill.cache.reader import Cache
from fmdistill.cache.teacher_pass import Pass
from fmdistill.cache.verification import holds_head, verify_files, verify_values
from fmdistill.files import sweep
from fmdistill.images import Images, Shard
from fmdistill.images import build as build_images
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

RECORD = 300  # bytes of a sample in its sidecar: little beside a map, a third of a vector
TRIMMED = 0.75  # share of a map that is valid in a 4:3 photograph; of wider ones less


def open_cache(recipe: Recipe) -> Cache:
    """Return the recipe's cache, finished, for reading."""
    settings = cache_of(recipe)
    return Cache(local(settings), build_images(recipe.images))


def run(recipe: Recipe) -> dict[str, Any]:
    """Cache the teacher's outputs for every image of the recipe that has none yet; return the manifest."""
    settings = cache_of(recipe)
    root = local(settings)
    images = build_images(recipe.images)
    shards = images.shards()  # first, so that missing images are noticed before a teacher is loaded
    if (done := finished(recipe, images, shards) or _finished_without_file(recipe, images, shards)) is not None:
        return done
    plan = functools.partial(_plan, root, images, shards)
    executor = executors.check(settings.executor)
    try:
        executor(images=images, start=functools.partial(start, recipe), plan=plan)
    finally:
        sweep(root)  # also of an actor that died in this very run
    return manifest.read(root)


def start(recipe: Recipe, images: Images | None = None) -> Pass:
    """Load the teacher, claim its cache's folder and keep its head there; return the pass, which writes shards.

    Every process that caches begins so, on whatever machine. UserError where the folder holds another cache.
    """
    settings, images = cache_of(recipe), images or build_images(recipe.images)
    root = local(settings)
    model = load_teacher(recipe)
    there = behind(root)
    with there.alone() if there else nullcontext():
        found = manifest.claim(root, identity(recipe, images, model))
        sweep(root)
        if not holds_head(root, head := model.head()):
            head.save(root)
        if os.access(root, os.W_OK):  # a cache may be lent for reading only
            recipes.save(recipe, root)
        unchanged.note(recipe.teacher or {}, root)
        if there:
            there.share()
            manifest.claim(root, found)
    token, codecs = manifest.identity_hash(found), by_split(found["codec"])
    return Pass(model, images, root, token, codecs, settings.max_failed, expected=0)


def verify(recipe: Recipe, samples: int = 64) -> dict[str, float]:
    """Check every checksum, then recompute a sample; return the errors. UserError naming what is damaged.

    If the teacher's file is gone, nothing is recomputed, and {"shards": ...} alone is returned.
    """
    cache = open_cache(recipe)
    shards = verify_files(cache)
    log.info("%s: every checksum of the %d shards is right", cache.root, shards)
    weights = teacher.weights_path(recipe.teacher or {})
    if weights is not None and not weights.exists():
        told = teacher.asked(recipe.teacher or {}, cache.manifest["teacher"])
        manifest.claim(cache.root, asked(recipe, cache.images, cache.manifest, told))
        cache.head()
        log.warning("%s: no value was recomputed, since the teacher's file is gone: %s", cache.root, weights)
        return {"shards": shards}
    model = load_teacher(recipe)
    manifest.claim(cache.root, identity(recipe, cache.images, model))
    if not holds_head(cache.root, model.head()):
        raise UserError(
            f"{cache.root}: head.json and head.safetensors are missing, damaged or not the teacher's; "
            f"`fmdistill cache RECIPE` writes them anew"
        )
    return {"shards": shards, **verify_values(cache, model, samples)}


def load_teacher(recipe: Recipe) -> teacher.Teacher:
    """Return the recipe's teacher with the outputs that the cache keeps. UserError where it does not suit the cache."""
    settings, model = cache_of(recipe), teacher.build(recipe.teacher or {})
    if settings.trim:
        teacher.check_pads(model)
    if taken := [name for name in model.outputs if name.endswith(SIMILARITY)]:
        raise UserError(f"teacher: its output '{taken[0]}' ends as those of cache.similarity do; rename it")
    return similarity.WithSimilarity(model) if settings.similarity else model


def identity(recipe: Recipe, images: Images, model: teacher.Teacher) -> dict[str, Any]:
    """Return what the cache's values depend on, and nothing else: no path, clock or host."""
    return {
        "family": model.family,
        "teacher": model.fingerprint(),
        "outputs": {name: list(shape) for name, shape in model.outputs.items()},
        **settled(recipe, images, model.outputs),
    }


def estimate(images: Images, shards: list[Shard]) -> dict[str, int]:
    """Return the images to come by split; shards beyond the first of a split are taken to be as large as it."""
    expected: dict[str, int] = {}
    for split in {s.split for s in shards}:
        ours = [s for s in shards if s.split == split]
        first = images.source.count(ours[0].name)
        expected[split] = sum(first if s.take is None else s.take for s in ours)
    return expected


def _plan(root: Path, images: Images, shards: list[Shard]) -> Plan:
    """Return what is missing in the claimed folder `root`; UserError where the disk has no room for it."""
    if there := behind(root):
        there.pull()
    found = manifest.read(root)
    left = missing(root, shards, found)
    expected = estimate(images, left)
    if left and there is None:  # of a bucket this machine keeps a part only
        _check_space(root, found, expected)
    elif not left:
        log.info("%s: all %d shards are cached", root, len(shards))
    return Plan(left, sum(expected.values()), f"caching {found['teacher']['name']}")


def _finished_without_file(recipe: Recipe, images: Images, shards: list[Shard]) -> dict[str, Any] | None:
    """Return the manifest if the teacher's file is gone and nothing is left for it to do."""
    settings, root = recipe.teacher or {}, local(cache_of(recipe))
    weights = teacher.weights_path(settings)
    if weights is None or weights.exists() or not (root / manifest.NAME).exists():
        return None
    found = manifest.read(root)
    done = complete(root, asked(recipe, images, found, teacher.asked(settings, found["teacher"])), shards)
    if done is not None:
        log.info("%s: the teacher's file is gone, and not needed", root)
    return done


def _check_space(root: Path, found: Mapping[str, Any], expected: dict[str, int]) -> None:
    need, codecs = sum(RECORD * count for count in expected.values()), by_split(found["codec"])
    for split, count in expected.items():
        for name, shape in found["outputs"].items():
            codec, shape = codecs[split].of(name), tuple(shape)
            share = TRIMMED if codec.trim and not stacked(shape) else 1
            need += round(share * (codec.size((count, *shape)) if stacked(shape) else count * codec.size(shape)))
    free = shutil.disk_usage(root).free
    images = sum(expected.values())
    log.info("%s: about %d images to cache, %.2f GB; %.1f GB free", root, images, need / 1e9, free / 1e9)
    if need > free:
        raise UserError(
            f"{root}: needs {need / 1e9:.1f} GB but only {free / 1e9:.1f} GB are free; choose another "
            f"cache.root=FOLDER, or fewer images with images.limit={max(1, int(images * free / need * 0.95))}"
        )
