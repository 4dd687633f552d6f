"""Which samples a tar holds and where their columns lie, from one pass over its headers."""

import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from fmdistill.images.folder import by_suffix
from fmdistill.images.picture import SUFFIXES
from fmdistill.images.source import CAPTION
from fmdistill.registry import UserError

LABEL = "cls"
LINKS = 40  # in a chain, as many as Linux follows
Extent = tuple[int, int]  # offset, bytes


@dataclass(frozen=True)
class Columns:
    """Which columns of a sample are its image, its label and its captions.

    A name means the column of this name or, without one, the only column that ends in "." and this name. Without
    `image` it is the only column whose suffix is an image's; of several the only one without a dot. Null for `label`
    or `caption` reads none.
    """

    image: str | None = None
    label: str | None = LABEL
    caption: str | None = CAPTION


@dataclass(frozen=True)
class Index:
    """Where each image and its columns lie: {key: {column: (offset, bytes)}}, the image first; and what is damaged.

    `oddities` are lines about what the tar holds beside whole samples.
    """

    images: dict[str, dict[str, Extent]]
    fault: str | None
    oddities: tuple[str, ...] = ()


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


class _Members:
    """The files of a tar as its extraction leaves them: links followed, and of a repeated member the last."""

    def __init__(self) -> None:
        self.files: dict[str, Extent] = {}
        self.links: dict[str, str] = {}  # by path: the path of a symbolic link's target
        self.lost: dict[str, str] = {}  # links whose target is not in the tar

    def add(self, member: tarfile.TarInfo) -> None:
        """Take the next member."""
        name = _normal(member.name)
        if posixpath.basename(name).startswith(".") or not (member.isreg() or member.islnk() or member.issym()):
            return
        for kind in (self.links, self.lost):
            kind.pop(name, None)
        if member.isreg():
            self.files[name] = (member.offset_data, member.size)
        elif member.issym():
            self.files.pop(name, None)
            self.links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        else:  # a hard link is to what its target is now
            target = _normal(posixpath.normpath(member.linkname))
            if (extent := self._resolve(target)) is not None:
                self.files[name] = extent
            else:
                self.lost[name] = target

    def follow(self) -> None:
        """Give every symbolic link its target's extent, at the end of the files."""
        for name, target in self.links.items():
            if (extent := self._resolve(target)) is not None:
                self.files[name] = extent
            else:
                self.lost[name] = target

    def _resolve(self, name: str) -> Extent | None:
        for _ in range(LINKS):
            if name not in self.links:
                return self.files.get(name)
            name = self.links[name]
        return None


def scan(file: BinaryIO, where: str, columns: Columns = Columns()) -> Index:
    """Return the index of a tar by one pass over its headers; a damaged tar gives what is whole, and its fault."""
    end = file.seek(0, 2)
    if end == 0:
        return Index({}, "an empty file of 0 bytes, as a failed download leaves it")
    file.seek(0)
    members = _Members()
    position = 0
    try:
        with tarfile.open(fileobj=_Bounded(file, end), mode="r:") as tar:  # type: ignore[arg-type]
            try:
                while (member := tar.next()) is not None:
                    members.add(member)
                    tar.members = []  # else tarfile keeps them all
            finally:
                position = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two for sizes beyond any file's
        if position == 0:
            return Index({}, f"not a tar ({error}), or a compressed one, which must be unpacked first")
    members.follow()
    # tarfile takes a cut or broken header for the end, so the end is looked for: a block of zeros.
    position = min(max(position, 0), end)
    file.seek(position)
    block = file.read(tarfile.BLOCKSIZE)
    samples, unnamed = _samples(members.files, where)
    cut = {key for key, held in samples.items() if any(not _whole(extent, end) for _, extent in held.values())}
    images, oddities = _images(samples, columns, where)
    for key in cut:  # the whole key goes: what is left would lack a column
        images.pop(key, None)
    if len(block) < tarfile.BLOCKSIZE:
        return Index(images, f"truncated at byte {end}{_last(images)}")
    if any(block):
        return Index(images, f"damaged at byte {position}, where a member's header should be{_last(images)}")
    if members.lost:
        name, target = min(members.lost.items())
        oddities.append(
            f"{len(members.lost)} links lead to nothing in the tar and are left out, '{name}' (to '{target}') first"
        )
    if unnamed:
        oddities.append(f"{len(unnamed)} members have no suffix and belong to no sample, '{unnamed[0]}' first")
    fault = None if images else f"holds no images ({columns.image or ', '.join(SUFFIXES)}){_held(samples)}"
    return Index(images, fault, tuple(oddities))


def split(name: str) -> tuple[str, str] | None:
    """Return a member's key, its path up to the first dot of the base name, and its column, the rest in lower case.

    None without a dot. As webdataset does.
    """
    start = name.rfind("/") + 1
    dot = name.find(".", start + 1)
    return (name[:dot], name[dot + 1 :].lower()) if dot > 0 else None


def matching(columns: Iterable[str], name: str) -> list[str]:
    """Return the columns that `name` may mean: the one of this name, else those that end in "." and the name."""
    listed = list(columns)
    return [name] if name in listed else [column for column in listed if column.endswith(f".{name}")]


def _samples(files: Mapping[str, Extent], where: str) -> tuple[dict[str, dict[str, tuple[str, Extent]]], list[str]]:
    """Return {key: {column: (member, extent)}} in the tar's order, and the members without a column."""
    samples: dict[str, dict[str, tuple[str, Extent]]] = {}
    unnamed = []
    for name, extent in files.items():
        parts = split(name)
        if parts is None:
            unnamed.append(name)
            continue
        key, column = parts
        held = samples.setdefault(key, {})
        if column in held:
            raise UserError(
                f"{where}: holds two columns '{column}' of the key '{key}' ('{held[column][0]}' and '{name}'); "
                f"rename one and pack the tar again"
            )
        held[column] = (name, extent)
    return samples, unnamed


def _images(
    samples: Mapping[str, Mapping[str, tuple[str, Extent]]], columns: Columns, where: str
) -> tuple[dict[str, dict[str, Extent]], list[str]]:
    """Return {key: {column: extent}}, the image first, in the order of the images; and lines about the rest."""
    images: dict[str, dict[str, Extent]] = {}
    alone: list[str] = []
    for key, held in samples.items():
        image = _image(key, list(held), columns.image, where)
        if image is None:
            alone.append(key)
        else:
            extents = {column: extent for column, (_, extent) in held.items()}
            images[key] = {image: extents.pop(image), **extents}
    lines = []
    if alone:
        counts = Counter(column for key in alone for column in samples[key])
        lines.append(
            f"{len(alone)} samples have no {f'column {columns.image}' if columns.image else 'image'} and are left out "
            f"({by_suffix(counts)}), '{alone[0]}' first"
        )
    for what, name in (("label", columns.label), ("caption", columns.caption)):
        if name is not None:
            lines += _doubts(images, what, name)
    return dict(sorted(images.items(), key=lambda item: next(iter(item[1].values()))[0])), lines


def _image(key: str, columns: list[str], name: str | None, where: str) -> str | None:
    """Return the column of a sample's image, None without one. UserError if that is ambiguous."""
    if name is None:
        chosen = [column for column in columns if column.rpartition(".")[2] in SUFFIXES]
        if len(chosen) > 1:
            chosen = [column for column in chosen if "." not in column] or chosen
    else:
        chosen = matching(columns, name)
    if len(chosen) > 1:
        raise UserError(
            f"{where}: the sample '{key}' has several columns that may be its image, {', '.join(chosen)}; name the one "
            f"to take by images.columns={{image: {chosen[0]}}}, or rename the others if they are images of their own "
            f"(a key ends at the first dot of the base name)"
        )
    return chosen[0] if chosen else None


def _doubts(images: Mapping[str, Mapping[str, Extent]], what: str, name: str) -> list[str]:
    several, empty, without = [], [], []
    for key, held in images.items():
        chosen = matching(list(held)[1:], name)
        if len(chosen) > 1:
            several.append((key, chosen))
        elif not chosen:
            without.append(key)
        elif what == "caption" and chosen and held[chosen[0]][1] == 0:
            empty.append(key)
    lines = []
    if several:
        key, chosen = several[0]
        lines.append(
            f"{len(several)} images have several columns that may be the {what}, and none is taken: '{key}' first "
            f"({', '.join(chosen)}); name one by images.columns={{{what}: {chosen[0]}}}"
        )
    if without and name not in (LABEL, CAPTION):
        lines.append(f"{len(without)} images have no column {name} for the {what}, '{without[0]}' first")
    if empty:
        lines.append(f"{len(empty)} images have an empty caption, '{empty[0]}' first")
    return lines


def _whole(extent: Extent, end: int) -> bool:
    return extent[1] >= 0 and extent[0] + extent[1] <= end


def _held(samples: Mapping[str, Mapping[str, Any]]) -> str:
    counts = Counter(column for held in samples.values() for column in held)
    return f"; its columns are {by_suffix(counts)}" if counts else ""


def _last(images: dict[str, Any]) -> str:
    return f", after the image '{next(reversed(images))}'" if images else ""


def _normal(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name
