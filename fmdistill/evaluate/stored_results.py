"""Stored results: reuse one if nothing that it depends on has changed, and resume an interrupted evaluation."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fmdistill
from fmdistill import images
from fmdistill import recipe as recipes
from fmdistill.cache import manifest, store
from fmdistill.evaluate import results
from fmdistill.evaluate.results import Row
from fmdistill.files import file_hash, write_whole
from fmdistill.logs import JsonLines, read_json_lines
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError


def state(
    protocol: Mapping[str, Any],
    recipe: Recipe,
    weights: Mapping[str, Path],
    splits: Collection[str] = ("validation",),
    inputs: Any = None,
) -> dict[str, Any]:
    """Return everything a result depends on, as JSON: protocol, weights by subject, images of `splits`, and the cache.

    `protocol` is the protocol's JSON, and `inputs` JSON of what is evaluated instead of images of the protocol or the
    recipe. An image with the same key at the same place counts as unchanged.
    """
    parts = [protocol, *(part for part in protocol.values() if isinstance(part, Mapping))]
    protocol_images = next((part["images"] for part in parts if isinstance(part.get("images"), Mapping)), None)
    root = store.of(recipe.cache).folder if recipe.cache is not None else None
    manifest_file = root / manifest.NAME if root is not None else None
    return {
        "version": fmdistill.__version__,
        "format": results.FORMAT,
        "protocol": json.loads(json.dumps(protocol)),
        "files": {text: file_hash(path) for part in parts for text, path in _files(part)},
        "weights": {name: file_hash(path) for name, path in weights.items()},
        "images": _digest(images_state(protocol_images or recipe.images, splits) if inputs is None else inputs),
        "cache": file_hash(manifest_file) if manifest_file is not None and manifest_file.is_file() else None,
    }


def images_state(settings: Mapping[str, Any], splits: Collection[str] = ("validation",)) -> list[Any]:
    """Return JSON of a source's identity and its images of `splits`."""
    source = images.build(settings)
    shards = [(s.name, s.take, list(s.keys or [])) for s in source.shards() if s.split in splits]
    return [source.identity(), shards]


def read_rows(path: Path, state: Mapping[str, Any]) -> list[Row] | None:
    """Return the rows stored at `path` if they depend on exactly this `state`, else None."""
    try:
        result = json.loads(path.read_text())
        return result["rows"] if result["of"] == state else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(settings: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Yield each setting that names a file, such as a file of class names, with the file's path."""
    for value in settings.values():
        if isinstance(value, str) and value:
            try:
                yield value, recipes.locate(value)
            except UserError:
                continue


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Partial:
    """The results of single images of an unfinished evaluation, each stored in a file as soon as it is made."""

    path: Path
    done: dict[str, dict[str, Any]]  # each image's result, JSON

    @classmethod
    def open(cls, path: Path, state: Mapping[str, Any]) -> "Partial":
        """Return the results that an interrupted evaluation stored at `path`; none if it had another `state`."""
        head, rows = {"state": state}, read_json_lines(path)
        rows = rows[1:] if rows[:1] == [head] else []
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(row) + "\n" for row in [head, *rows]))  # without a half-written last line
        return cls(path, {row["image"]: row["result"] for row in rows})

    def add(self, image: str, result: dict[str, Any]) -> None:
        """Store the result of one image."""
        JsonLines(self.path).write({"image": image, "result": result})
        self.done[image] = result
