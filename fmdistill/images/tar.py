"""Images in tars: SA-1B's own, img2dataset's and webdataset's, on a disk or behind a URL that fsspec knows."""

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
_SCANNING = threading.Lock()  # of several threads that load images, one reads a tar's headers

KEPT = 32  # indices of the tars last used: one of SA-1B's 11,186 images takes about 6 MB


@dataclass(frozen=True)
class Tar:
    """The tars that `train` and `validation` list, below `root`: a folder or a URL such as "s3://bucket/sa1b".

    An entry is a name, a glob, or braces such as "sa_{000020..000029}.tar". A shard is a tar, by its path below `root`
    without ".tar"; of a tar elsewhere, by its name alone.

    A key is a member's path up to the first dot of its base name, and the rest is its column: the members "KEY.jpg",
    "KEY.cls", "KEY.seg.png", anywhere in the tar, are one sample. `columns` names those of the image, the label (a
    whole number) and the captions (one a line); see `Columns`. Links are read as their targets, and of a member that
    occurs twice the last one, as when the tar is unpacked.

    A tar's headers are read before its images, for an index that this object keeps while the tar is among the 32 last
    used, and that forked loader workers inherit; a process without it reads the headers again. Behind a URL that can
    be as much as the whole tar: write "simplecache::" before the URL to keep a local copy (on each machine, until the
    process ends; "filecache::" keeps it longer), or where the server cannot seek.
    """

    root: str = "."
    train: list[str] | str = field(default_factory=list)
    validation: list[str] | str = field(default_factory=list)
    columns: Columns = Columns()

    def __post_init__(self) -> None:
        """Check the settings."""
        for each in fields(self.columns):
            if (name := getattr(self.columns, each.name)) is not None and not re.fullmatch(r"[^\s./][^\s/A-Z]*", name):
                raise UserError(
                    f"images.columns.{each.name}='{name}': expected what follows the first dot of a member's name, in "
                    f"lower case, such as jpg, cls or outputs.txt"
                )

    def shards(self) -> dict[str, list[str]]:
        """Return the tars' shard names in the order of the lists; a glob's are sorted."""
        listed = {split: list(places) for split, places in self._places.items()}
        if not listed["train"] and not listed["validation"]:
            raise UserError(f"images.train: lists no tars; name some of those in images.root={self.root}")
        return listed

    def count(self, shard: str) -> int:
        """Return how many whole images the tar holds."""
        return len(self._index(shard).images)

    def keys(self, shard: str) -> list[str]:
        """Return the keys of the tar's whole images, in its order."""
        return list(self._index(shard).images)

    def read(self, shard: str) -> Iterator[Encoded]:
        """Yield the images in the tar's order; after the last whole one, a damaged tar raises a UserError."""
        index = self._index(shard)
        for oddity in index.oddities:
            _log.warning("%s: %s", self._at(shard), oddity)
        with self._at(shard).open() as file:
            for key, members in index.images.items():
                yield self._encoded(file, key, members, shard)
        if index.fault:
            raise UserError(
                f"{self._at(shard)}: {index.fault}; {len(index.images)} images before it are whole. "
                f"Download it again, or leave it out of images.train and images.validation"
            )

    def fetch(self, shard: str, key: str) -> Encoded:
        """Return one image; KeyError where the tar holds no such whole image."""
        members = self._index(shard).images[key]
        with self._at(shard).open() as file:
            return self._encoded(file, key, members, shard)

    def identity(self) -> dict:
        """Return the rules by which keys, images and labels are made; the lists may grow."""
        columns = {"image": self.columns.image, "label": self.columns.label}  # captions decide nothing that is cached
        return {"name": "tar", "key": "path up to the first dot of the base name, as unpacked", "columns": columns}

    def _encoded(self, file: BinaryIO, key: str, members: dict[str, Extent], shard: str) -> Encoded:
        columns = {}
        for column, (offset, size) in members.items():
            file.seek(offset)
            columns[column] = file.read(size)
            if len(columns[column]) != size:
                raise UserError(
                    f"{self._at(shard)}: changed while it was read, at '{key}'; run again when it lies still"
                )
        data = columns.pop(next(iter(members)))
        label = _only(columns, self.columns.label)
        number = None if label is None else _number(columns[label], f"{self._at(shard)}: '{key}.{label}'")
        return Encoded(key, data, number, columns, _only(columns, self.columns.caption))

    def _at(self, shard: str) -> "Place":
        return next(places[shard] for places in self._places.values() if shard in places)

    def _index(self, shard: str) -> Index:
        with _SCANNING:
            if shard not in self._indices:
                while len(self._indices) >= KEPT:
                    self._indices.pop(next(iter(self._indices)))
                place = self._at(shard)
                with place.open() as file:
                    self._indices[shard] = scan(file, str(place), self.columns)
            return self._indices[shard]

    @cached_property
    def _indices(self) -> dict[str, Index]:
        return {}

    @cached_property
    def _places(self) -> dict[str, dict[str, "Place"]]:
        listed: dict[str, dict[str, Place]] = {}
        known: dict[str, tuple[str, Place]] = {}
        for split, entries in zip(SPLITS, (self.train, self.validation), strict=True):
            listed[split] = {}
            for place in _expand(self.root, entries, f"images.{split}"):
                name = place.shard
                if name in known:
                    before, other = known[name]
                    if posixpath.normpath(other.path) == posixpath.normpath(place.path):
                        raise UserError(f"images.{split}: {place} is the same tar in images.{before}; list it once")
                    raise UserError(
                        f"images.{split}: {place} has the same name as {other}, and one lies outside of "
                        f"images.root={self.root}; give a root above both, such as images.root={_above(place, other)}"
                    )
                known[name] = (split, place)
                listed[split][name] = place
        return listed

    def labels(self, shard: str) -> list[int | None]:
        """Return the labels of the shard's images, in the order of the keys, reading their columns alone."""
        labels: list[int | None] = []
        with self._at(shard).open() as file:
            for key, members in self._index(shard).images.items():
                column = _only(members, self.columns.label)
                offset, size = members[column] if column is not None else (0, 0)
                file.seek(offset)
                where = f"{self._at(shard)}: '{key}.{column}'"
                labels.append(None if column is None else _number(file.read(size), where))
        return labels


@dataclass(frozen=True)
class Place:
    """A tar at `path` of the file system that `url` names, and the name of its shard."""

    url: str
    path: str
    shard: str

    def __str__(self) -> str:
        return self.path

    def open(self) -> BinaryIO:
        """Return the file, open for reading and seeking."""
        system = _system(self.url)
        try:
            file = system.open(self.path, "rb")
        except OSError as error:
            raise UserError(f"{self}: cannot be opened ({error}); is it readable?") from error
        try:
            file.seek(0, 2)
        except ValueError as error:
            file.close()
            raise UserError(f"{self}: cannot seek there ({error}); write simplecache:: before images.root") from error
        return file


def _only(columns: Mapping[str, Any], name: str | None) -> str | None:
    chosen = [] if name is None else matching(columns, name)
    return chosen[0] if len(chosen) == 1 else None


def _number(data: bytes, where: str) -> int:
    text = decode_text(data, where).strip()
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise UserError(
            f"{where} holds {_short(text)}, and a label is a whole number from 0; write numbers, or read no labels by "
            f"images.columns={{label: null}}"
        )
    return int(text)


def _short(text: str) -> str:
    return ascii(text) if len(text) <= 40 else f"{ascii(text[:40])}..."


def _above(one: "Place", other: "Place") -> str:
    try:
        return posixpath.commonpath([posixpath.dirname(one.path), posixpath.dirname(other.path)])
    except ValueError:  # of two file systems
        return "FOLDER"


def _shard(path: str, root: str | None) -> str:
    """Return a tar's path below `root` as a file name, without ".tar"; its own name if it lies elsewhere."""
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
            raise UserError(f"{where}: '{entry}': {error}; braces are such as sa_{{000020..000029}}.tar") from error
        for name in names:
            apart = "://" in name or name.startswith("/")
            yield from _find("" if apart else root.rstrip("/") + "/", name, where, root)


def _find(base: str, name: str, where: str, root: str) -> list[Place]:
    system = _system(base + name)
    path = str(system._strip_protocol(base + name))
    if not path.lower().endswith(".tar"):
        raise UserError(f"{where}: {path}: expected a name that ends in .tar; unpack a compressed one")
    try:
        # of the default root, which is the working folder, only what is named relative to it lies below it
        below = None if root == "." and not base else str(system._strip_protocol(root))
        if system.isfile(path):
            return [Place(base + name, path, _shard(path, below))]
        pattern = str(system._strip_protocol(glob.escape(base) + name))
        found = sorted(map(str, system.glob(pattern))) if glob.has_magic(name) else []
    except OSError as error:
        raise UserError(f"{where}: {path}: cannot be looked up ({error}); is images.root right?") from error
    if not found:
        raise UserError(f"{where}: {path}: no such tar; correct the list, or images.root, below which it is looked up")
    return [Place(base + name, match, _shard(match, below)) for match in found]


def _system(url: str) -> Any:
    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"images.root: '{url}': {error}") from error
