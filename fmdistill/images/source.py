"""What a source of images is: named shards of encoded images, read in order or fetched by key."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import quote, unquote

from fmdistill.text import decode_text

SPLITS = ("train", "validation")
CAPTION = "txt"  # the column of captions in img2dataset's and webdataset's tars


@dataclass(frozen=True)
class Encoded:
    """One image as it is stored; `extra` holds its other columns by name, such as {"json": b"..."}.

    `caption_column` is the one of them that holds the captions.
    """

    key: str
    data: bytes
    label: int | None = None
    extra: Mapping[str, bytes] = field(default_factory=dict)
    caption_column: str | None = CAPTION


class Source(Protocol):
    """Lists shards and reads one. Shard names and keys never depend on the order in which a file system lists files.

    A source whose shard may come to hold other images under its name has `listed(shard)`, its keys now. One that knows
    labels without reading images has `labels(shard)`, a label or None for each of the keys.
    """

    def shards(self) -> dict[str, list[str]]:
        """Return {"train": [...], "validation": [...]}; names are unique and safe as file names."""
        ...

    def count(self, shard: str) -> int:
        """Return how many images the shard holds."""
        ...

    def keys(self, shard: str) -> list[str]:
        """Return the shard's keys, in their order."""
        ...

    def read(self, shard: str) -> Iterator[Encoded]:
        """Yield the shard's images in their order."""
        ...

    def fetch(self, shard: str, key: str) -> Encoded:
        """Return one image of the shard; KeyError where it holds no such key."""
        ...

    def identity(self) -> dict:
        """Return what determines keys and pixels (the name, seeds, sizes), without where the files lie."""
        ...


def captions(shard: str, encoded: Encoded) -> list[str]:
    """Return the image's captions, one a line of its column; [] if it has none.

    Runs of white space become one space, and blank lines are dropped. UserError if the column is not UTF-8.
    """
    column = encoded.caption_column
    if column is None or column not in encoded.extra:
        return []
    text = decode_text(encoded.extra[column], f"{shard}: image '{encoded.key}', column {column}")
    return [caption for line in text.split("\n") if (caption := " ".join(line.split()))]


def escape(key: str) -> str:
    """Return `key` as a tar member's base name: no dot and no slash, so webdataset splits it where we do."""
    # surrogateescape: a file name that is not UTF-8 reaches us as lone surrogates
    return quote(key, safe="", errors="surrogateescape").replace(".", "%2E")


def unescape(name: str) -> str:
    """Return the key that `escape` turned into `name`."""
    return unquote(name, errors="surrogateescape")
