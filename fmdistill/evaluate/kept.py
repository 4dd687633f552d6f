"""What a stored result is of, so that nothing is judged twice; and what an interrupted evaluation has judged."""

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
) -> dict[str, Any]:
    """Return JSON of all that a result depends on: protocol, weights by subject, images of `splits`, and the cache.

    `protocol` is its JSON. Images that keep their key and their place are taken to be the same.
    """
    parts = [protocol, *(part for part in protocol.values() if isinstance(part, Mapping))]
    own = next((part["images"] for part in parts if isinstance(part.get("images"), Mapping)), None)
    listed = images.build(own or recipe.images)
    shards = [(s.name, s.take, list(s.keys or [])) for s in listed.shards() if s.split in splits]
    root = store.of(recipe.cache).folder if recipe.cache is not None else None
    described = root / manifest.NAME if root is not None else None
    return {
        "version": fmdistill.__version__,
        "format": results.FORMAT,
        "protocol": json.loads(json.dumps(protocol)),
        "files": {text: file_hash(path) for part in parts for text, path in _files(part)},
        "weights": {name: file_hash(path) for name, path in weights.items()},
        "images": _digest([listed.identity(), shards]),
        "cache": file_hash(described) if described is not None and described.is_file() else None,
    }


def stored(path: Path, of: Mapping[str, Any]) -> list[Row] | None:
    """Return the rows stored at `path` if they are of this state, else None."""
    try:
        found = json.loads(path.read_text())
        return found["rows"] if found["of"] == of else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(settings: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Yield the settings that are files, such as one of class names."""
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
    """Results of single images, JSON each, on disk as soon as they are made; those of another `state` are dropped."""

    path: Path
    done: dict[str, dict[str, Any]]  # by the image

    @classmethod
    def open(cls, path: Path, state: Mapping[str, Any]) -> "Partial":
        """Return what an interrupted evaluation of this state left at `path`."""
        head, rows = {"state": state}, read_json_lines(path)
        rows = rows[1:] if rows[:1] == [head] else []
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(row) + "\n" for row in [head, *rows]))  # without a half-written last line
        return cls(path, {row["image"]: row["result"] for row in rows})

    def add(self, image: str, result: dict[str, Any]) -> None:
        """Store the result of one image."""
        JsonLines(self.path).write({"image": image, "result": result})
        self.done[image] = result
