"""Source `tar`: images in tars as of SA-1B, img2dataset or webdataset, on a disk or at any URL that fsspec opens."""

import glob
import logging
import posixpath
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, BinaryIO

import braceexpand
import fsspec.core

from fmdistill.images.source import SPLITS, Encoded
from fmdistill.images.tar_index import Columns, Extent, Index, matching, scan
from fmdistill.registry import UserError, parse
from fmdistill.text import decode_text

_log = logging.getLogger(__name__)
_SCANNING = threading.Lock()  # only one of the threads that load images reads a tar's headers

CACHED_INDICES = 32  # of the tars used last; an index of SA-1B's 11,186 images takes about 6 MB


@dataclass(frozen=True)
class Tar:
    """The tars listed in `train` and `validation`, below `root`: a folder or a URL such as "s3://bucket/sa1b".

    An entry is a name, a glob, or braces such as "sa_{000020..000029}.tar". Each tar is a shard, named by its path
    below `root` without ".tar"; a tar outside `root`, by its file name alone.

    A key is a member's path up to the first dot of its base name, and the rest is its column: the members "KEY.jpg",
    "KEY.cls" and "KEY.seg.png", anywhere in the tar, are one sample. `columns` names the columns of the image, the
    label (a whole number) and the captions (one a line); see `Columns`. As when the tar is unpacked, links mean their
    targets, and the last of several members of one name counts.

    The headers of a tar are read before its images, to build an index. This object stores the indices of the 32 tars
    used last, and forked loader workers inherit them; other processes read the headers again. At a URL, that may read
    the whole tar: write "simplecache::" before the URL to store a local copy (on each machine, until the process ends;
    "filecache::" stores it longer). A server that cannot seek needs this too.
    """

    root: str = "."
    train: list[str] | str = field(default_factory=list)
    validation: list[str] | str = field(default_factory=list)
    columns: Columns = Columns()

    def __post_init__(self) -> None:
        """Check the settings."""
        for column in fields(self.columns):
            name = getattr(self.columns, column.name)
            if name is not None and not re.fullmatch(r"[^\s./][^\s/A-Z]*", name):
                raise UserError(
                    f"images.columns.{column.name}='{name}': expected the part of a member's name after its first dot, "
                    f"in lower case, such as jpg, cls or outputs.txt"
                )

    def shards(self) -> dict[str, list[str]]:
        """Return the shard names of the tars in the order of the lists; the tars of a glob are sorted."""
        shards = {split: list(places) for split, places in self._places.items()}
        if not shards["train"] and not shards["validation"]:
            raise UserError(f"images.train: lists no tars; name tars in images.root={self.root}")
        return shards

    def count(self, shard: str) -> int:
        """Return the number of complete images in the tar."""
        return len(self._index(shard).images)

    def keys(self, shard: str) -> list[str]:
        """Return the keys of the tar's complete images, in its order."""
        return list(self._index(shard).images)

    def read(self, shard: str) -> Iterator[Encoded]:
        """Yield the images in the tar's order. A damaged tar raises UserError after its last complete image."""
        index = self._index(shard)
        for oddity in index.oddities:
            _log.warning("%s: %s", self._place(shard), oddity)
        with self._place(shard).open() as file:
            for key, members in index.images.items():
                yield self._encoded(file, key, members, shard)
        if index.fault:
            raise UserError(
                f"{self._place(shard)}: {index.fault}; {len(index.images)} images before it are complete. "
                f"Download it again, or leave it out of images.train and images.validation"
            )

    def fetch(self, shard: str, key: str) -> Encoded:
        """Return one image. Raises KeyError if the tar contains no complete image of this key."""
        members = self._index(shard).images[key]
        with self._place(shard).open() as file:
            return self._encoded(file, key, members, shard)

    def identity(self) -> dict:
        """Return the rules that determine keys, images and labels, without the lists, which may grow."""
        columns = {"image": self.columns.image, "label": self.columns.label}  # `caption_column` is asked for apart
        return {"name": "tar", "key": "path up to the first dot of the base name, as unpacked", "columns": columns}

    def caption_column(self) -> str | None:
        """Return the setting that names the captions' column; None if they are not read."""
        return self.columns.caption

    def _encoded(self, file: BinaryIO, key: str, members: dict[str, Extent], shard: str) -> Encoded:
        columns = {}
        for column, (offset, size) in members.items():
            file.seek(offset)
            columns[column] = file.read(size)
            if len(columns[column]) != size:
                raise UserError(
                    f"{self._place(shard)}: changed while it was read, at '{key}'; run again when nothing writes to it"
                )
        data = columns.pop(next(iter(members)))
        label = _unique_column(columns, self.columns.label)
        number = None if label is None else _number(columns[label], f"{self._place(shard)}: '{key}.{label}'")
        return Encoded(key, data, number, columns, _unique_column(columns, self.columns.caption))

    def _place(self, shard: str) -> "Place":
        return next(places[shard] for places in self._places.values() if shard in places)

    def _index(self, shard: str) -> Index:
        with _SCANNING:
            if shard not in self._indices:
                while len(self._indices) >= CACHED_INDICES:
                    self._indices.pop(next(iter(self._indices)))
                place = self._place(shard)
                with place.open() as file:
                    self._indices[shard] = scan(file, str(place), self.columns)
            return self._indices[shard]

    @cached_property
    def _indices(self) -> dict[str, Index]:
        return {}

    @cached_property
    def _places(self) -> dict[str, dict[str, "Place"]]:
        places: dict[str, dict[str, Place]] = {}
        by_name: dict[str, tuple[str, Place]] = {}
        for split, entries in zip(SPLITS, (self.train, self.validation), strict=True):
            places[split] = {}
            for place in _expand(self.root, entries, f"images.{split}"):
                name = place.shard
                if name in by_name:
                    other_split, other = by_name[name]
                    if posixpath.normpath(other.path) == posixpath.normpath(place.path):
                        raise UserError(f"images.{split}: {place} is also in images.{other_split}; list it once")
                    raise UserError(
                        f"images.{split}: {place} has the same name as {other}, and at least one of them is outside of "
                        f"images.root={self.root}; give a root above both, such as "
                        f"images.root={_common_folder(place, other)}"
                    )
                by_name[name] = (split, place)
                places[split][name] = place
        return places

    def labels(self, shard: str) -> list[int | None]:
        """Return the labels of the shard's images, in the order of the keys, reading only the label columns."""
        labels: list[int | None] = []
        with self._place(shard).open() as file:
            for key, members in self._index(shard).images.items():
                column = _unique_column(members, self.columns.label)
                offset, size = members[column] if column is not None else (0, 0)
                file.seek(offset)
                where = f"{self._place(shard)}: '{key}.{column}'"
                labels.append(None if column is None else _number(file.read(size), where))
        return labels


@dataclass(frozen=True)
class Place:
    """The location of a tar: `path` in the file system of `url`, and the name of its shard."""

    url: str
    path: str
    shard: str

    def __str__(self) -> str:
        return self.path

    def open(self) -> BinaryIO:
        """Open the tar for reading and seeking. Raises UserError if that fails."""
        system = _system(self.url)
        try:
            file = system.open(self.path, "rb")
        except OSError as error:
            raise UserError(f"{self}: cannot be opened ({error}); is it readable?") from error
        try:
            file.seek(0, 2)
        except ValueError as error:
            file.close()
            raise UserError(f"{self}: cannot seek ({error}); write simplecache:: before images.root") from error
        return file


def _unique_column(columns: Mapping[str, Any], name: str | None) -> str | None:
    chosen = [] if name is None else matching(columns, name)
    return chosen[0] if len(chosen) == 1 else None


def _number(data: bytes, where: str) -> int:
    text = decode_text(data, where).strip()
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise UserError(
            f"{where} contains {_short(text)}, but a label is a whole number, 0 or more; write numbers, or read no "
            f"labels with images.columns={{label: null}}"
        )
    return int(text)


def _short(text: str) -> str:
    return ascii(text) if len(text) <= 40 else f"{ascii(text[:40])}..."


def _common_folder(first: "Place", second: "Place") -> str:
    try:
        return posixpath.commonpath([posixpath.dirname(first.path), posixpath.dirname(second.path)])
    except ValueError:  # they are in two file systems
        return "FOLDER"


def _shard(path: str, root: str | None) -> str:
    """Return a tar's path below `root` as a file name, without ".tar"; only its base name if it is outside `root`."""
    path, base = posixpath.normpath(path), posixpath.normpath(root or "").rstrip("/") + "/"
    if root is None or not path.startswith(base) or "/" not in path[len(base) :]:
        return posixpath.basename(path)[: -len(".tar")]
    return path[len(base) : -len(".tar")].replace("%", "%25").replace("/", "%2F")


def _expand(root: str, entries: list[str] | str, where: str) -> Iterator[Place]:
    if isinstance(entries, str) and entries.startswith("[") and entries.endswith("]"):
        entries = [str(entry) for entry in parse(entries, where)]  # a list on the command line
    for entry in [entries] if isinstance(entries, str) else entries:
        try:
            names = list(braceexpand.braceexpand(entry))
        except ValueError as error:
            raise UserError(f"{where}: '{entry}': {error}; write braces as in sa_{{000020..000029}}.tar") from error
        for name in names:
            absolute = "://" in name or name.startswith("/")
            yield from _match("" if absolute else root.rstrip("/") + "/", name, where, root)


def _match(base: str, name: str, where: str, root: str) -> list[Place]:
    """Return the tars that a name or glob below `base` means. Raises UserError if there are none."""
    system = _system(base + name)
    path = str(system._strip_protocol(base + name))
    if not path.lower().endswith(".tar"):
        raise UserError(f"{where}: {path}: expected a name that ends in .tar; uncompress a compressed tar first")
    try:
        # Only relative names are below the default root, which is the working folder.
        top = None if root == "." and not base else str(system._strip_protocol(root))
        if system.isfile(path):
            return [Place(base + name, path, _shard(path, top))]
        pattern = str(system._strip_protocol(glob.escape(base) + name))
        matches = sorted(map(str, system.glob(pattern))) if glob.has_magic(name) else []
    except OSError as error:
        raise UserError(f"{where}: {path}: cannot be looked up ({error}); is images.root right?") from error
    if not matches:
        raise UserError(f"{where}: {path}: no such tar; correct the list, or images.root if the folder is wrong")
    return [Place(base + name, match, _shard(match, top)) for match in matches]


def _system(url: str) -> Any:
    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"images.root: '{url}': {error}") from error
