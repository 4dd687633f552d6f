"""Images in tars: SA-1B's own, img2dataset's and webdataset's, on a disk or behind a URL that fsspec knows."""

import glob
import logging
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO

import braceexpand
import fsspec.core

from fmdistill.images.source import SPLITS, Encoded
from fmdistill.images.tar_index import Index, scan
from fmdistill.registry import UserError, parse

_log = logging.getLogger(__name__)

KEPT = 32  # indices of the tars last used: one of SA-1B's 11,186 images takes about 6 MB


@dataclass(frozen=True)
class Tar:
    """The tars that `train` and `validation` list, below `root`: a folder or a URL such as "s3://bucket/sa1b".

    An entry is a name, a glob, or braces such as "sa_{000020..000029}.tar". A shard is a tar, by its name without
    ".tar". A key is an image's member path without its last suffix; members "KEY.json", "KEY.txt", ... anywhere in
    the tar are its columns, and "KEY.cls" its label.

    A tar's headers are read before its images, for an index that this object keeps while the tar is among the 32 last
    used, and that forked loader workers inherit; a process without it reads the headers again. Behind a URL that can
    be as much as the whole tar: write "simplecache::" before the URL to keep a local copy (on each machine, until the
    process ends; "filecache::" keeps it longer), or where the server cannot seek.
    """

    root: str = "."
    train: list[str] | str = field(default_factory=list)
    validation: list[str] | str = field(default_factory=list)

    def shards(self) -> dict[str, list[str]]:
        """Return the tars' names without ".tar", in the order of the lists; a glob's are sorted."""
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
        for oddity in index.oddities():
            _log.warning("%s: %s", self._at(shard), oddity)
        with self._at(shard).open() as file:
            for key, members in index.images.items():
                yield _encoded(file, key, members, str(self._at(shard)))
        if index.fault:
            raise UserError(
                f"{self._at(shard)}: {index.fault}; {len(index.images)} images before it are whole. "
                f"Download it again, or leave it out of images.train and images.validation"
            )

    def fetch(self, shard: str, key: str) -> Encoded:
        """Return one image; KeyError where the tar holds no such whole image."""
        members = self._index(shard).images[key]
        with self._at(shard).open() as file:
            return _encoded(file, key, members, str(self._at(shard)))

    def identity(self) -> dict:
        """Return the rule by which keys are made; the lists may grow."""
        return {"name": "tar", "key": "path without the last suffix"}

    def _at(self, shard: str) -> "Place":
        return next(places[shard] for places in self._places.values() if shard in places)

    def _index(self, shard: str) -> Index:
        if shard not in self._indices:
            while len(self._indices) >= KEPT:
                self._indices.pop(next(iter(self._indices)))
            place = self._at(shard)
            with place.open() as file:
                self._indices[shard] = scan(file, str(place))
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
                name = posixpath.basename(place.path)[: -len(".tar")]
                if name in known:
                    before, other = known[name]
                    same = "the same tar" if other.path == place.path else f"a tar of the same name as {other}"
                    raise UserError(f"images.{split}: {place} is {same} in images.{before}; list it once")
                known[name] = (split, place)
                listed[split][name] = place
        return listed

    def labels(self, shard: str) -> list[int | None]:
        """Return the labels of the shard's images, in the order of the keys, reading their "cls" members alone."""
        found: list[int | None] = []
        with self._at(shard).open() as file:
            for members in self._index(shard).images.values():
                offset, size = members.get("cls", (0, 0))
                file.seek(offset)
                found.append(_label(file.read(size)))
        return found


@dataclass(frozen=True)
class Place:
    """A file at `path` of the file system that `url` names."""

    url: str
    path: str

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


def _encoded(file: BinaryIO, key: str, members: dict[str, tuple[int, int]], where: str) -> Encoded:
    columns = {}
    for suffix, (offset, size) in members.items():
        file.seek(offset)
        columns[suffix] = file.read(size)
        if len(columns[suffix]) != size:
            raise UserError(f"{where}: changed while it was read, at '{key}'; run again when it lies still")
    data = columns.pop(next(iter(members)))
    return Encoded(key, data, _label(columns.get("cls", b"")), columns)


def _label(column: bytes) -> int | None:
    label = column.strip()
    return int(label) if label.isdigit() and len(label) <= 18 else None  # of more digits it is no class


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
            yield from _find("" if apart else root.rstrip("/") + "/", name, where)


def _find(base: str, name: str, where: str) -> list[Place]:
    system = _system(base + name)
    path = str(system._strip_protocol(base + name))
    if not path.lower().endswith(".tar"):
        raise UserError(f"{where}: {path}: expected a name that ends in .tar; unpack a compressed one")
    try:
        if system.isfile(path):
            return [Place(base + name, path)]
        pattern = str(system._strip_protocol(glob.escape(base) + name))
        found = sorted(map(str, system.glob(pattern))) if glob.has_magic(name) else []
    except OSError as error:
        raise UserError(f"{where}: {path}: cannot be looked up ({error}); is images.root right?") from error
    if not found:
        raise UserError(f"{where}: {path}: no such tar; correct the list, or images.root, below which it is looked up")
    return [Place(base + name, match) for match in found]


def _system(url: str) -> Any:
    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"images.root: '{url}': {error}") from error
