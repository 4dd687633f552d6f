"""Tell from a cache's small files whether it is finished, without opening a checkpoint or importing torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fmdistill import recipe as recipes
from fmdistill.cache import captions, manifest, outputs, sidecar, store, unchanged
from fmdistill.cache.store import Store
from fmdistill.images import Images, Shard
from fmdistill.images import build as build_images
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, convert
from fmdistill.teachers.output import Output


def is_live(settings: Mapping[str, Any] | None) -> bool:
    """Return whether the teacher of these settings runs during training instead of once into a cache."""
    return convert((settings or {}).get("live", False), bool, "teacher.live")


def cache_of(recipe: Recipe) -> recipes.CacheSettings:
    """Return the settings of the recipe's cache; UserError if it caches nothing."""
    if recipe.cache is None or recipe.teacher is None:
        raise UserError("this recipe caches nothing: it has no `teacher` and `cache`")
    if is_live(recipe.teacher):
        raise UserError("teacher.live=true: this teacher runs during training and is not cached; leave `live` out")
    return recipe.cache


def is_finished(recipe: Recipe) -> bool:
    """Log and return whether nothing is left to cache, as far as that is known without the teacher.

    UserError if the folder holds another cache, or the images cannot be listed.
    """
    images = build_images(recipe.images)
    return finished(recipe, images, images.shards()) is not None


def finished(recipe: Recipe, images: Images, shards: Sequence[Shard]) -> dict[str, Any] | None:
    """Return the manifest if teacher.json shows the recipe's teacher and no shard is missing; else None."""
    opened = store.opened(cache_of(recipe))
    root = opened.folder
    if not (root / manifest.NAME).exists():
        return None
    if captions.requested(recipe.teacher) not in (None, captions.stored(manifest.read(root)["outputs"])):
        manifest.claim(root, requested_identity(recipe, images, manifest.read(root)))  # raises
    if not unchanged.is_noted(recipe.teacher or {}, root):
        return None
    done = complete(opened, requested_identity(recipe, images, manifest.read(root)), shards)
    if done is not None and unchanged.lost_files(root):
        log.info("%s: the teacher's file is gone, and not needed", root)
    return done


def complete(store: Store, identity: Mapping[str, Any], shards: Sequence[Shard]) -> dict[str, Any] | None:
    """Return the manifest of the cache in `store` if nothing of it is missing; UserError if its identity is another."""
    claimed = manifest.claim(store.folder, identity)
    if claimed["head"] and not _has_head(store.folder) or missing(store, shards, claimed):
        return None
    log.info("%s: all %d shards are cached", store.folder, len(shards))
    return claimed


def requested_identity(
    recipe: Recipe, images: Images, stored: Mapping[str, Any], teacher: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Return the identity that the recipe asks for, as far as its settings state it; the rest is the `stored` one.

    `teacher` is the part of the teacher's fingerprint that the settings state.
    """
    settings = cache_of(recipe)
    own: dict[str, Output] = {name: o for name, o in outputs.from_json(stored["outputs"]).items() if o.of is None}
    if (count := captions.requested(recipe.teacher)) is None:
        count = captions.stored(own)
    own = captions.with_captions(own, count)
    given = outputs.with_similarities(own) if settings.similarity else own
    return {
        **stored,
        "teacher": {**stored["teacher"], **teacher},
        "outputs": outputs.to_json(outputs.stored(given, settings)),
        "images": images.identity(count > 0),
    }


def missing(store: Store, shards: Sequence[Shard], claimed: Mapping[str, Any]) -> list[Shard]:
    """Return the shards that are not finished in `store`, whose manifest is `claimed`."""
    token, stored = manifest.identity_hash(claimed), outputs.from_json(claimed["outputs"])
    return [shard for shard in shards if not sidecar.finished(store, shard, token, stored)]


def _has_head(root: Path) -> bool:
    """Return whether the files of the teacher's head exist and can be opened."""
    try:
        json.loads((root / "head.json").read_text())
        with safe_open(root / "head.safetensors", "numpy") as file:
            return bool(file.keys())
    except (OSError, ValueError, SafetensorError):
        return False
