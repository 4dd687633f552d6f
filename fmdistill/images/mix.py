"""Several sources as one, told apart by the first word of their shards' names."""

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
    """Named sources in turn; the shard "train-03" of the source `photos` is called "photos-train-03"."""

    sources: dict[str, dict]

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("images.sources: empty; name at least one source")
        for name in self.sources:
            if not re.fullmatch(r"\w+", name, re.ASCII):
                raise UserError(f"images.sources.{name}: expected a name of letters, digits and '_'")
        _ = self.members  # so that a wrong setting shows before any data is touched

    def shards(self) -> dict[str, list[str]]:
        """Return the sources' shards, one of each source in turn."""
        listed = {}
        for name, source in self.members.items():
            listed[name] = _placed(name, source.shards)
        return {split: _in_turn({name: shards.get(split, []) for name, shards in listed.items()}) for split in SPLITS}

    def count(self, shard: str) -> int:
        """Return how many images the shard holds."""
        source, name = self._find(shard)
        return source.count(name)

    def keys(self, shard: str) -> list[str]:
        """Return the shard's keys, in their order."""
        source, name = self._find(shard)
        return source.keys(name)

    def listed(self, shard: str) -> list[str] | None:
        """Return the shard's keys where its source has `listed`, for it may come to hold others."""
        source, name = self._find(shard)
        listed = getattr(source, "listed", None)
        return listed(name) if listed else None

    def labels(self, shard: str) -> list[int | None]:
        """Return the labels of the shard's images, in the order of the keys."""
        from fmdistill.images import labels

        return labels(*self._find(shard))

    def read(self, shard: str) -> Iterator[Encoded]:
        """Yield the shard's images in their order."""
        source, name = self._find(shard)
        yield from source.read(name)

    def fetch(self, shard: str, key: str) -> Encoded:
        """Return one image of the shard; KeyError where it holds no such key."""
        source, name = self._find(shard)
        return source.fetch(name, key)

    def identity(self) -> dict:
        """Return the sources' identities by name."""
        return {"name": "mix", "sources": {name: source.identity() for name, source in self.members.items()}}

    @cached_property
    def members(self) -> dict[str, Source]:
        """The sources by name, bound and checked, their data not yet touched."""
        from fmdistill.images import SOURCES  # which lists this class, so not at import

        bound = {name: bind(given, SOURCES, f"images.sources.{name}") for name, given in self.sources.items()}
        return {name: _placed(name, source) for name, source in bound.items()}

    def _find(self, shard: str) -> tuple[Source, str]:
        group, _, name = shard.partition("-")
        return self.members[group], name


def _placed(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except UserError as error:
        raise UserError(f"images.sources.{name}: {error}") from None


def _in_turn(listed: dict[str, list[str]]) -> list[str]:
    turns = zip_longest(*([f"{name}-{shard}" for shard in shards] for name, shards in listed.items()))
    return [shard for turn in turns for shard in turn if shard is not None]
