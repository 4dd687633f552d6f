"""Where a tar's images and their columns lie, found by one pass over its headers."""

import posixpath
import tarfile
from dataclasses import dataclass
from typing import Any, BinaryIO

from fmdistill.images.source import SUFFIXES
from fmdistill.registry import UserError


@dataclass(frozen=True)
class Index:
    """Where each image and its columns lie: {key: {suffix: (offset, bytes)}}, the image first; and what is damaged.

    `alone` are the columns that belong to no image, as a failed download leaves them.
    """

    images: dict[str, dict[str, tuple[int, int]]]
    fault: str | None
    alone: tuple[str, ...] = ()

    def oddities(self) -> list[str]:
        """Return a line for each kind of incomplete sample: captions without an image, images with an empty caption."""
        found = []
        texts = [name for name in self.alone if name.lower().endswith(".txt")]
        empty = [key for key, members in self.images.items() if members.get("txt", (0, 1))[1] == 0]
        if texts:
            found.append(f"{len(texts)} captions have no image and are left out, '{texts[0]}' first")
        if empty:
            found.append(f"{len(empty)} images have an empty caption, '{empty[0]}' first")
        return found


@dataclass(frozen=True)
class _Bounded:
    """A file that is never asked for more than it holds: tarfile reads what an extended header claims in one piece."""

    file: BinaryIO
    end: int

    def read(self, size: int) -> bytes:
        return self.file.read(max(0, min(size, self.end - self.file.tell())))

    def seek(self, position: int) -> int:
        return self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()


def scan(file: BinaryIO, where: str) -> Index:
    """Return the index of a tar by one pass over its headers; a damaged tar gives what is whole, and its fault."""
    end = file.seek(0, 2)
    if end == 0:
        return Index({}, "an empty file of 0 bytes, as a failed download leaves it")
    file.seek(0)
    found: list[tuple[str, int, int]] = []
    position = 0
    try:
        with tarfile.open(fileobj=_Bounded(file, end), mode="r:") as tar:  # type: ignore[arg-type]
            try:
                for member in tar:
                    name = _normal(member.name)
                    if member.isreg() and not posixpath.basename(name).startswith("._"):
                        found.append((name, member.offset_data, member.size))
            finally:
                position = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two for sizes beyond any file's
        if position == 0:
            return Index({}, f"not a tar ({error}), or a compressed one, which must be unpacked first")
    # tarfile takes a cut or broken header for the end, so the end is looked for: a block of zeros.
    position = min(max(position, 0), end)
    file.seek(position)
    block = file.read(tarfile.BLOCKSIZE)
    images, alone = _group(found, where)
    for name, offset, size in found:
        if size < 0 or offset + size > end:  # the whole key goes: what is left would lack a column
            images.pop(_owner(name, images) or "", None)
    if len(block) < tarfile.BLOCKSIZE:
        return Index(images, f"truncated at byte {end}{_last(images)}")
    if any(block):
        return Index(images, f"damaged at byte {position}, where a member's header should be{_last(images)}")
    return Index(images, None if images else f"holds no images ({', '.join(SUFFIXES)})", tuple(alone))


def _group(members: list[tuple[str, int, int]], where: str) -> tuple[dict[str, dict[str, tuple[int, int]]], list[str]]:
    """Return {key: {suffix: (offset, bytes)}} in the images' order, and the columns of no image.

    webdataset splits at the first dot and merges a.v1.jpg with a.v2.jpg; here an image's key ends at its last dot.
    """
    images: dict[str, dict[str, tuple[int, int]]] = {}
    columns, alone = [], []
    for name, offset, size in members:
        key, suffix = posixpath.splitext(name)
        if suffix[1:].lower() not in SUFFIXES:
            columns.append((name, offset, size))
        elif key in images:
            raise UserError(f"{where}: holds two images of the key '{key}'; rename one and pack the tar again")
        else:
            images[key] = {suffix[1:].lower(): (offset, size)}
    for name, offset, size in columns:
        key = _owner(name, images)
        if key is None:
            alone.append(name)
            continue
        suffix = name[len(key) + 1 :].lower()
        if suffix in images[key]:
            raise UserError(f"{where}: holds two columns '{suffix}' of the key '{key}'; rename one and pack it again")
        images[key][suffix] = (offset, size)
    return images, alone


def _owner(name: str, images: dict[str, dict[str, tuple[int, int]]]) -> str | None:
    """Return the longest key in `images` that is `name` without some of its suffixes."""
    start = name.rfind("/") + 1
    dot = name.rfind(".", start)
    while dot > start:
        if name[:dot] in images:
            return name[:dot]
        dot = name.rfind(".", start, dot)
    return None


def _last(images: dict[str, Any]) -> str:
    return f", after the image '{next(reversed(images))}'" if images else ""


def _normal(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name
