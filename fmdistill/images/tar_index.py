"""The index of a tar: its samples and the positions of their columns, from one pass over its headers."""

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
LINKS = 40  # longest chain of symbolic links, which is Linux's limit
Extent = tuple[int, int]  # offset and length of a file in the tar, in bytes


@dataclass(frozen=True)
class Columns:
    """The names of a sample's image, label and caption columns.

    A name means the column of this name or, if there is none, the only column that ends in "." and this name. If
    `image` is null, the image is the only column with an image's suffix or, if there are several, the only one of them
    without a dot. If `label` or `caption` is null, it is not read.
    """

    image: str | None = None
    label: str | None = LABEL
    caption: str | None = CAPTION


@dataclass(frozen=True)
class Index:
    """The positions of each sample's columns, {key: {column: (offset, bytes)}}, its image first.

    `fault` describes the tar's damage, None if it is intact; `oddities` are lines about members that are not used.
    """

    images: dict[str, dict[str, Extent]]
    fault: str | None
    oddities: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Bounded:
    """A file that limits reads to its size: tarfile allocates what an extended header claims, which may be damaged."""

    file: BinaryIO
    end: int

    def read(self, size: int) -> bytes:
        return self.file.read(max(0, min(size, self.end - self.file.tell())))

    def seek(self, position: int) -> int:
        return self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()


class _Members:
    """The files of a tar after extraction: links resolved, and only the last member of each name."""

    def __init__(self) -> None:
        self.files: dict[str, Extent] = {}
        self.links: dict[str, str] = {}  # the target's path of each symbolic link
        self.dangling: dict[str, str] = {}  # the target's path of each link whose target is not in the tar

    def add(self, member: tarfile.TarInfo) -> None:
        """Add the next member."""
        name = _normal(member.name)
        if posixpath.basename(name).startswith(".") or not (member.isreg() or member.islnk() or member.issym()):
            return
        for kind in (self.links, self.dangling):
            kind.pop(name, None)
        if member.isreg():
            self.files[name] = (member.offset_data, member.size)
        elif member.issym():
            self.files.pop(name, None)
            self.links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        else:  # a hard link means the content of its target at this point of the tar
            target = _normal(posixpath.normpath(member.linkname))
            if (extent := self._resolve(target)) is not None:
                self.files[name] = extent
            else:
                self.dangling[name] = target

    def follow(self) -> None:
        """Resolve the symbolic links, adding each as a file with its target's extent."""
        for name, target in self.links.items():
            if (extent := self._resolve(target)) is not None:
                self.files[name] = extent
            else:
                self.dangling[name] = target

    def _resolve(self, name: str) -> Extent | None:
        for _ in range(LINKS):
            if name not in self.links:
                return self.files.get(name)
            name = self.links[name]
        return None


def scan(file: BinaryIO, where: str, columns: Columns = Columns()) -> Index:
    """Build the index of a tar by one pass over its headers; for a damaged tar, of the complete samples before it."""
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
                    tar.members = []  # else tarfile stores all of them
            finally:
                position = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two for sizes beyond any file's
        if position == 0:
            return Index({}, f"not a tar ({error}), or a compressed one, which must be unpacked first")
    members.follow()
    # tarfile stops at a cut or broken header without an error, so check that the end is a block of zeros.
    position = min(max(position, 0), end)
    file.seek(position)
    block = file.read(tarfile.BLOCKSIZE)
    samples, unnamed = _samples(members.files, where)
    cut = {key for key, sample in samples.items() if any(not _whole(extent, end) for _, extent in sample.values())}
    images, oddities = _images(samples, columns, where)
    for key in cut:  # the whole sample, since the rest would lack a column
        images.pop(key, None)
    if len(block) < tarfile.BLOCKSIZE:
        return Index(images, f"truncated at byte {end}{_last(images)}")
    if any(block):
        return Index(images, f"damaged at byte {position}, in place of a member's header{_last(images)}")
    if members.dangling:
        name, target = min(members.dangling.items())
        oddities.append(
            f"ignored {len(members.dangling)} links whose targets are not in the tar, first '{name}' (to '{target}')"
        )
    if unnamed:
        oddities.append(f"ignored {len(unnamed)} members without a suffix, first '{unnamed[0]}'")
    fault = None if images else f"contains no images ({columns.image or ', '.join(SUFFIXES)}){_columns_of(samples)}"
    return Index(images, fault, tuple(oddities))


def split(name: str) -> tuple[str, str] | None:
    """Split a member's name, as webdataset does, into its key and its column in lower case; None if it has no dot.

    The key is the path up to the first dot of the base name, and the column is the rest.
    """
    start = name.rfind("/") + 1
    dot = name.find(".", start + 1)
    return (name[:dot], name[dot + 1 :].lower()) if dot > 0 else None


def matching(columns: Iterable[str], name: str) -> list[str]:
    """Return the columns that `name` may mean: the column of this name, else those that end in "." and the name."""
    columns = list(columns)
    return [name] if name in columns else [column for column in columns if column.endswith(f".{name}")]


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
        sample = samples.setdefault(key, {})
        if column in sample:
            raise UserError(
                f"{where}: contains two columns '{column}' of the key '{key}' ('{sample[column][0]}' and '{name}'); "
                f"rename one and pack the tar again"
            )
        sample[column] = (name, extent)
    return samples, unnamed


def _images(
    samples: Mapping[str, Mapping[str, tuple[str, Extent]]], columns: Columns, where: str
) -> tuple[dict[str, dict[str, Extent]], list[str]]:
    """Return {key: {column: extent}}, the image first, in the order of the images; and lines about the oddities."""
    images: dict[str, dict[str, Extent]] = {}
    without: list[str] = []
    for key, sample in samples.items():
        image = _image(key, list(sample), columns.image, where)
        if image is None:
            without.append(key)
        else:
            extents = {column: extent for column, (_, extent) in sample.items()}
            images[key] = {image: extents.pop(image), **extents}
    lines = []
    if without:
        counts = Counter(column for key in without for column in samples[key])
        lines.append(
            f"ignored {len(without)} samples without {f'a column {columns.image}' if columns.image else 'an image'} "
            f"({by_suffix(counts)}), first '{without[0]}'"
        )
    for what, name in (("label", columns.label), ("caption", columns.caption)):
        if name is not None:
            lines += _oddities(images, what, name)
    return dict(sorted(images.items(), key=lambda item: next(iter(item[1].values()))[0])), lines


def _image(key: str, columns: list[str], name: str | None, where: str) -> str | None:
    """Return the column of a sample's image, None if it has none. Raises UserError if several columns qualify."""
    if name is None:
        chosen = [column for column in columns if column.rpartition(".")[2] in SUFFIXES]
        if len(chosen) > 1:
            chosen = [column for column in chosen if "." not in column] or chosen
    else:
        chosen = matching(columns, name)
    if len(chosen) > 1:
        raise UserError(
            f"{where}: the sample '{key}' has several columns that may be its image, {', '.join(chosen)}; choose one "
            f"with images.columns={{image: {chosen[0]}}}, or rename the others if they belong to other samples (a key "
            f"ends at the first dot of the base name)"
        )
    return chosen[0] if chosen else None


def _oddities(images: Mapping[str, Mapping[str, Extent]], what: str, name: str) -> list[str]:
    several, empty, without = [], [], []
    for key, sample in images.items():
        chosen = matching(list(sample)[1:], name)
        if len(chosen) > 1:
            several.append((key, chosen))
        elif not chosen:
            without.append(key)
        elif what == "caption" and chosen and sample[chosen[0]][1] == 0:
            empty.append(key)
    lines = []
    if several:
        key, chosen = several[0]
        lines.append(
            f"{len(several)} images have several columns that may be the {what}, and none is read: first '{key}' "
            f"({', '.join(chosen)}); choose one with images.columns={{{what}: {chosen[0]}}}"
        )
    if without and name not in (LABEL, CAPTION):
        lines.append(f"{len(without)} images have no column {name} for the {what}, first '{without[0]}'")
    if empty:
        lines.append(f"{len(empty)} images have an empty caption, first '{empty[0]}'")
    return lines


def _whole(extent: Extent, end: int) -> bool:
    return extent[1] >= 0 and extent[0] + extent[1] <= end


def _columns_of(samples: Mapping[str, Mapping[str, Any]]) -> str:
    counts = Counter(column for sample in samples.values() for column in sample)
    return f"; its columns are {by_suffix(counts)}" if counts else ""


def _last(images: dict[str, Any]) -> str:
    return f", after the image '{next(reversed(images))}'" if images else ""


def _normal(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name
