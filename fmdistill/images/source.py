"""The interface of an image source: named shards of encoded images, read in order or one by key."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import quote, unquote

from fmdistill.text import decode_text

SPLITS = ("train", "validation")
CAPTION = "txt"  # the column of captions in img2dataset's and webdataset's tars


@dataclass(frozen=True)
class Encoded:
    """An image's stored bytes; `extra` holds its other columns by name, such as {"json": b"..."}.

    `caption_column` is the name of the column in `extra` that contains the captions, if any.
    """

    key: str
    data: bytes
    label: int | None = None
    extra: Mapping[str, bytes] = field(default_factory=dict)
    caption_column: str | None = CAPTION


class Source(Protocol):
    """A set of images in shards. Shard names and keys never depend on the order in which a file system lists files.

    Three methods are optional: `current_keys(shard)` returns the shard's keys now, for a source whose shards may change
    under their names; `labels(shard)` returns a label or None for each key without reading images; `caption_column()`
    returns the name of the captions' column, for a source in which it is a setting.
    """

    def shards(self) -> dict[str, list[str]]:
        """Return {"train": [...], "validation": [...]}; names are unique and safe as file names."""
        ...

    def count(self, shard: str) -> int:
        """Return the number of images in the shard."""
        ...

    def keys(self, shard: str) -> list[str]:
        """Return the shard's keys, in their order."""
        ...

    def read(self, shard: str) -> Iterator[Encoded]:
        """Yield the shard's images in their order."""
        ...

    def fetch(self, shard: str, key: str) -> Encoded:
        """Return one image. Raises KeyError if the shard has no such key."""
        ...

    def identity(self) -> dict:
        """Return the settings that determine keys and pixels (name, seeds, sizes), without the files' location."""
        ...


def captions(shard: str, encoded: Encoded) -> list[str]:
    """Return the captions of an image, one for each line of its caption column; [] if it has none.

    Runs of white space become one space, and blank lines are removed. Raises UserError if the column is not UTF-8.
    """
    column = encoded.caption_column
    if column is None or column not in encoded.extra:
        return []
    text = decode_text(encoded.extra[column], f"{shard}: image '{encoded.key}', column {column}")
    return [caption for line in text.split("\n") if (caption := " ".join(line.split()))]


def escape(key: str) -> str:
    """Escape `key` as a tar member's base name: without dots and slashes, so that webdataset splits it as we do."""
    # surrogateescape: Python reads a file name that is not UTF-8 as lone surrogates.
    return quote(key, safe="", errors="surrogateescape").replace(".", "%2E")


def unescape(name: str) -> str:
    """Return the key that `escape` turned into `name`."""
    return unquote(name, errors="surrogateescape")
