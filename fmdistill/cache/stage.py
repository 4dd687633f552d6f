"""Run the cache stage: list the missing shards, let an executor run the teacher over them, verify what is stored."""

import functools
import os
from collections.abc import Mapping
from typing import Any

from fmdistill import recipe as recipes
from fmdistill import teachers
from fmdistill.cache import captions, executors, manifest, outputs, similarity, store, unchanged
from fmdistill.cache.executors.processes import MissingShards
from fmdistill.cache.finished import cache_of, complete, finished, missing, requested_identity
from fmdistill.cache.reader import Cache
from fmdistill.cache.store import Store
from fmdistill.cache.teacher_pass import Pass
from fmdistill.cache.verification import holds_head, verify_files, verify_values
from fmdistill.files import sweep
from fmdistill.images import Images, Shard
from fmdistill.images import build as build_images
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.teachers.family import Teacher

RECORD = 300  # bytes of a sample in its sidecar: little beside a map, a third of a vector
TRIMMED = 0.75  # share of a map that is valid in a 4:3 photograph; of wider ones less


def open_cache(recipe: Recipe) -> Cache:
    """Return the recipe's cache, finished, for reading."""
    settings = cache_of(recipe)
    return Cache(store.opened(settings), build_images(recipe.images), recipe.teacher)


def run(recipe: Recipe) -> dict[str, Any]:
    """Cache the teacher's outputs for every image of the recipe that has none yet; return the manifest."""
    settings = cache_of(recipe)
    images = build_images(recipe.images)
    shards = images.shards()  # first, so that missing images are noticed before a teacher is loaded
    if (done := finished(recipe, images, shards) or _finished_without_file(recipe, images, shards)) is not None:
        return done
    captions.check_source(images, shards, captions.requested(recipe.teacher) or 0)
    opened = store.of(settings)
    plan = functools.partial(_plan, opened, images, shards)
    executor = executors.check(settings.executor)
    try:
        executor(images=images, start=functools.partial(start, recipe), plan=plan)
    finally:
        sweep(opened.folder)  # also of an actor that died in this very run
    return manifest.read(opened.folder)


def start(recipe: Recipe, images: Images | None = None) -> Pass:
    """Load the teacher, claim the cache's store and save the teacher's head in it; return the pass that writes shards.

    Every process that caches begins here, on any machine. Raises UserError if the store holds another cache.
    """
    settings, images = cache_of(recipe), images or build_images(recipe.images)
    opened = store.opened(settings)
    root, model = opened.folder, load_teacher(recipe)
    with opened.exclusive():
        claimed = manifest.claim(root, identity(recipe, images, model))
        sweep(root)
        if (head := model.head()) is not None and not holds_head(root, head):
            head.save(root)
        if os.access(root, os.W_OK):  # a cache may be lent for reading only
            recipes.save(recipe, root)
        unchanged.note(recipe.teacher or {}, root)
        opened.share()
        manifest.claim(root, claimed)  # another machine may have shared another manifest first
    token, stored = manifest.identity_hash(claimed), outputs.from_json(claimed["outputs"])
    return Pass(model, images, opened, token, stored, settings.max_failed, expected=0)


def verify(recipe: Recipe, samples: int = 64) -> dict[str, float]:
    """Check every checksum, then recompute a sample; return the errors. Raises UserError naming what is damaged.

    If the teacher's file is gone, nothing is recomputed, and {"shards": ...} alone is returned.
    """
    cache = open_cache(recipe)
    shards = verify_files(cache)
    log.info("%s: every checksum of the %d shards is right", cache.root, shards)
    weights = teachers.weights_file(recipe.teacher or {})
    if weights is not None and not weights.exists():
        stated = teachers.identity(recipe.teacher or {}, cache.manifest["teacher"])
        manifest.claim(cache.root, requested_identity(recipe, cache.images, cache.manifest, stated))
        if cache.manifest["head"]:
            cache.head()
        log.warning("%s: no value was recomputed, since the teacher's file is gone: %s", cache.root, weights)
        return {"shards": shards}
    model = load_teacher(recipe)
    manifest.claim(cache.root, identity(recipe, cache.images, model))
    if (head := model.head()) is not None and not holds_head(cache.root, head):
        raise UserError(
            f"{cache.root}: head.json and head.safetensors are missing, damaged or not the teacher's; "
            f"`fmdistill cache RECIPE` writes them anew"
        )
    return {"shards": shards, **verify_values(cache, model, samples)}


def load_teacher(recipe: Recipe) -> Teacher:
    """Return the recipe's teacher with the outputs that the cache stores; UserError if the cache cannot store them."""
    settings, model = cache_of(recipe), teachers.build(recipe.teacher or {})
    if settings.trim:
        teachers.check_pads(model)
    return similarity.WithSimilarity(model) if settings.similarity else model


def identity(recipe: Recipe, images: Images, model: Teacher) -> dict[str, Any]:
    """Return what the cache's values depend on, and nothing else: no path, clock or host."""
    return {
        "family": model.family,
        "teacher": model.fingerprint(),
        "head": model.head() is not None,
        "outputs": outputs.to_json(outputs.stored(model.outputs, cache_of(recipe))),
        "images": images.identity(captions.count_of(model) > 0),
    }


def estimate(images: Images, shards: list[Shard]) -> dict[str, int]:
    """Return the images to cache by split, taking every shard of a split to be as large as its first one."""
    expected: dict[str, int] = {}
    for split in {s.split for s in shards}:
        own = [s for s in shards if s.split == split]
        first = images.source.count(own[0].name)
        expected[split] = sum(first if s.take is None else s.take for s in own)
    return expected


def _plan(store: Store, images: Images, shards: list[Shard]) -> MissingShards:
    """Return what is missing in the claimed `store`; UserError if the disk has no room for it."""
    store.pull()
    stored = manifest.read(store.folder)
    left = missing(store, shards, stored)
    expected = estimate(images, left)
    if left:
        _check_space(store, stored, expected)
    else:
        log.info("%s: all %d shards are cached", store.folder, len(shards))
    return MissingShards(left, sum(expected.values()), f"caching {stored['teacher']['name']}")


def _finished_without_file(recipe: Recipe, images: Images, shards: list[Shard]) -> dict[str, Any] | None:
    """Return the manifest if the teacher's file is gone and nothing is left for it to do."""
    settings, opened = recipe.teacher or {}, store.opened(cache_of(recipe))
    root = opened.folder
    weights = teachers.weights_file(settings)
    if weights is None or weights.exists() or not (root / manifest.NAME).exists():
        return None
    stored = manifest.read(root)
    stated = teachers.identity(settings, stored["teacher"])
    done = complete(opened, requested_identity(recipe, images, stored, stated), shards)
    if done is not None:
        log.info("%s: the teacher's file is gone, and not needed", root)
    return done


def _check_space(store: Store, stored: Mapping[str, Any], expected: dict[str, int]) -> None:
    need = sum(RECORD * count for count in expected.values())
    for split, count in expected.items():
        for output in outputs.from_json(stored["outputs"]).values():
            codec, shape = output.codecs[split], output.shape
            share = TRIMMED if codec.trim else 1
            need += round(share * (codec.size((count, *shape)) if output.is_vector else count * codec.size(shape)))
    free, root = store.free(), store.folder
    images = sum(expected.values())
    if free is None:
        log.info("%s: about %d images to cache, %.2f GB", root, images, need / 1e9)
        return
    log.info("%s: about %d images to cache, %.2f GB; %.1f GB free", root, images, need / 1e9, free / 1e9)
    if need > free:
        raise UserError(
            f"{root}: needs {need / 1e9:.1f} GB but only {free / 1e9:.1f} GB are free; choose another "
            f"cache.root=FOLDER, or fewer images with images.limit={max(1, int(images * free / need * 0.95))}"
        )
