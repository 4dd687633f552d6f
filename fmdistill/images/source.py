"""What a source of images is: named shards of encoded images, read in order or fetched by key."""

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import quote, unquote

import numpy as np
import PIL.Image
import simplejpeg

SPLITS = ("train", "validation")
SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")  # of image files, in any case
ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")  # of an object in a library's message, another in each process


@dataclass(frozen=True)
class Encoded:
    """One image as it is stored; `extra` holds its other columns by suffix, such as {"json": b"..."}."""

    key: str
    data: bytes
    label: int | None = None
    extra: Mapping[str, bytes] = field(default_factory=dict)


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


class DecodeError(ValueError):
    """An image's bytes cannot be decoded; the message says why."""


def decode(data: bytes) -> np.ndarray:
    """Return the image as PIL's uint8 (H, W, 3) RGB; an EXIF orientation is not applied (SA-1B has none).

    DecodeError where the bytes are no whole image.
    """
    if (pixels := _plain_jpeg(data)) is not None:
        return pixels
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # PIL raises a dozen types for a broken file, struct.error and SyntaxError among them
        told = ADDRESS.sub("these bytes", str(error))  # a sidecar keeps it, and the same images make the same sidecar
        raise DecodeError(f"{type(error).__name__}: {told}") from error


def _plain_jpeg(data: bytes) -> np.ndarray | None:
    """Return a sound JPEG's pixels, PIL's own in two thirds of the time; None for what is left to PIL.

    That is CMYK, of which simplejpeg makes other colours, whatever makes libjpeg warn, and sizes that PIL warns of.
    """
    if not data.startswith(b"\xff\xd8\xff"):  # as PIL knows a JPEG
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        limit = PIL.Image.MAX_IMAGE_PIXELS
        if colours not in ("YCbCr", "Gray", "RGB") or (limit is not None and int(height) * int(width) > limit):
            return None
        return simplejpeg.decode_jpeg(data)
    except ValueError:
        return None


def escape(key: str) -> str:
    """Return `key` as a tar member's base name: no dot and no slash, so webdataset splits it where we do."""
    # surrogateescape: a file name that is not UTF-8 reaches us as lone surrogates
    return quote(key, safe="", errors="surrogateescape").replace(".", "%2E")


def unescape(name: str) -> str:
    """Return the key that `escape` turned into `name`."""
    return unquote(name, errors="surrogateescape")
