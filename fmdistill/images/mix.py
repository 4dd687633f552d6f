"""Source `mix`: several sources as one; the first word of a shard's name is its source."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

from fmdistill.images.source import SPLITS, Encoded, Source
from fmdistill.registry import UserError, bind


@dataclass(frozen=True)
class Mix:
    """Several named sources; the shard "train-03" of the source `photos` is called "photos-train-03"."""

    sources: dict[str, dict]

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("images.sources: empty; name at least one source")
        for name in self.sources:
            if not re.fullmatch(r"\w+", name, re.ASCII):
                raise UserError(f"images.sources.{name}: expected a name of letters, digits and '_'")
        _ = self.members  # so that a wrong setting raises before any data is touched

    def shards(self) -> dict[str, list[str]]:
        """Return the shards of all sources, taking one of each source in turn."""
        by_source = {}
        for name, source in self.members.items():
            by_source[name] = _name_source(name, source.shards)
        return {
            split: _interleave({name: shards.get(split, []) for name, shards in by_source.items()}) for split in SPLITS
        }

    def count(self, shard: str) -> int:
        """Return the number of images in the shard."""
        source, name = self._find(shard)
        return source.count(name)

    def keys(self, shard: str) -> list[str]:
        """Return the shard's keys, in their order."""
        source, name = self._find(shard)
        return source.keys(name)

    def current_keys(self, shard: str) -> list[str] | None:
        """Return the shard's current keys if its source has `current_keys`, else None."""
        source, name = self._find(shard)
        current_keys = getattr(source, "current_keys", None)
        return current_keys(name) if current_keys else None

    def labels(self, shard: str) -> list[int | None]:
        """Return the labels of the shard's images, in the order of the keys."""
        from fmdistill.images import labels

        return labels(*self._find(shard))

    def read(self, shard: str) -> Iterator[Encoded]:
        """Yield the shard's images in their order."""
        source, name = self._find(shard)
        yield from source.read(name)

    def fetch(self, shard: str, key: str) -> Encoded:
        """Return one image. Raises KeyError if the shard has no such key."""
        source, name = self._find(shard)
        return source.fetch(name, key)

    def identity(self) -> dict:
        """Return the sources' identities by name."""
        return {"name": "mix", "sources": {name: source.identity() for name, source in self.members.items()}}

    @cached_property
    def members(self) -> dict[str, Source]:
        """The sources by name, checked without touching their data."""
        from fmdistill.images import SOURCES  # which contains this class, so not at the top

        bound = {name: bind(settings, SOURCES, f"images.sources.{name}") for name, settings in self.sources.items()}
        return {name: _name_source(name, source) for name, source in bound.items()}

    def _find(self, shard: str) -> tuple[Source, str]:
        group, _, name = shard.partition("-")
        return self.members[group], name


def _name_source(name: str, call: Callable[[], Any]) -> Any:
    """Return the result of `call`; its UserError begins with the name of the source."""
    try:
        return call()
    except UserError as error:
        raise UserError(f"images.sources.{name}: {error}") from None


def _interleave(by_source: dict[str, list[str]]) -> list[str]:
    turns = zip_longest(*([f"{name}-{shard}" for shard in shards] for name, shards in by_source.items()))
    return [shard for turn in turns for shard in turn if shard is not None]
