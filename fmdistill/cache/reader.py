"""Read a cache: shards opened by their sidecars, members by offset, each checked at its first read in a process."""

import os
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal.isal_zlib import crc32  # zlib's, nine times as fast

from fmdistill.backbones.heads import load_head
from fmdistill.backbones.preprocess import Preprocess, from_json
from fmdistill.cache import manifest, sidecar
from fmdistill.cache.bucket import behind
from fmdistill.cache.codec import Shape, by_split, named, padded
from fmdistill.cache.sidecar import Finished
from fmdistill.images import Images, Shard
from fmdistill.registry import UserError

OPEN = 64  # tars that a process holds open; a system may allow it only a thousand files


class _Descriptor:
    """An open file, closed with its last use. Forked processes may share it: `pread` moves no position."""

    def __init__(self, path: Path) -> None:
        self.number = -1  # for `__del__`, where the next line fails
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@lru_cache(maxsize=OPEN)
def _opened(path: Path, owner: object) -> _Descriptor:
    return _Descriptor(path)


class ShardReader:
    """One finished shard: keys and sizes from the sidecar, outputs from the tar."""

    def __init__(self, shard: Shard, finished: Finished, group: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.name, self.path, self.group, fields = shard.name, finished.tar, group, finished.fields
        self.samples = [s for s in fields["samples"] if shard.take is None or s["index"] < shard.take]
        self.codec = named(fields["codec"])
        self.sha256, self.there = fields["sha256"], behind(self.path.parent)
        self.shapes = shapes
        self._owner = object()  # not the path: a shard that is written anew is another file
        self._checked: set[int] = set()

    @property
    def keys(self) -> list[str]:
        """The samples' keys, in order."""
        return [sample["key"] for sample in self.samples]

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Return one sample's outputs, such as {"embedding": float32 (C, g, g)}, of the cache's `shapes`."""
        shapes = {name: self.shape(index, name) for name in self.samples[index]["outputs"]}
        codecs = {name: self.codec.of(name) for name in shapes}
        slots = {name: np.empty(codecs[name].nbytes(shape), np.uint8) for name, shape in shapes.items()}
        self.read_into(index, slots)
        values = {name: codecs[name].unpack(torch.from_numpy(slots[name]), shape) for name, shape in shapes.items()}
        return {name: padded(value, self.shapes[name]).numpy() for name, value in values.items()}

    def shape(self, index: int, output: str) -> Shape:
        """Return the shape in which one sample's output is stored: the cache's, or that of its valid tokens."""
        found, whole = self.samples[index]["outputs"][output].get("shape"), self.shapes[output]
        if found is None:
            return whole
        if len(found) != len(whole) or any(a > b for a, b in zip(found, whole, strict=True)):
            raise UserError(
                f"{self.path}: its sidecar gives {output} the shape {found}; delete both, run `fmdistill cache`"
            )
        return tuple(found)

    def read_into(self, index: int, slots: Mapping[str, np.ndarray]) -> None:
        """Fill each output's slot, uint8 of as many bytes as its codec gives its `shape`, with what is stored."""
        file, sample = self._file(), self.samples[index]
        for name, member in sample["outputs"].items():
            if not self._fill(file.number, member, slots[name].data, index in self._checked):
                raise UserError(
                    f"{self.path}: the {name} of '{sample['key']}' is damaged (checksum); "
                    f"delete this file and run `fmdistill cache` again"
                )
        self._checked.add(index)

    @property
    def address(self) -> str:
        """Where the tar itself is, which in a bucket's folder is but a copy."""
        return f"{self.there.url}/{self.path.name}" if self.there else str(self.path)

    def present(self) -> Path:
        """Return the tar's path; of a bucket's after it was fetched, where it is not on this machine."""
        return self.there.fetch(self.path.name, self.sha256) if self.there else self.path

    def _file(self) -> _Descriptor:
        if self.there is None:
            return _opened(self.path, self._owner)
        while True:
            try:  # not kept open: a tar that was evicted would go on to fill the disk
                found = _Descriptor(self.path)
            except FileNotFoundError:
                self.present()  # and another process may need the room before this one opens it
            else:
                os.utime(found.number)  # so that the longest unused is evicted
                return found

    @staticmethod
    def _fill(file: int, member: Mapping[str, Any], data: memoryview, checked: bool) -> bool:
        """Read a member's data, after its .npy header, into `data`; return whether it is whole."""
        before = member["size"] - len(data)  # none before one row of many
        if before < 0:
            return False
        if checked:
            return os.preadv(file, [data], member["offset"] + before) == len(data)
        header = bytearray(before)
        whole = os.preadv(file, [header, data], member["offset"]) == member["size"]
        return whole and crc32(data, crc32(header)) == member["crc32"]


class Cache:
    """A finished cache, opened for the images that a recipe plans."""

    def __init__(self, root: str | Path, images: Images) -> None:
        self.root, self.images = Path(root), images
        self.manifest = manifest.read(self.root)

    @cached_property
    def identity(self) -> str:
        """Hash of the manifest; every sidecar repeats it."""
        return manifest.identity_hash(self.manifest)

    @property
    def family(self) -> str:
        """The teacher's family, the prefix of its outputs."""
        return self.manifest["family"]

    @cached_property
    def preprocess(self) -> Preprocess:
        """The teacher's preprocessing, which the student shares."""
        return from_json(self.manifest["teacher"]["preprocess"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each output of one image."""
        return {name: tuple(shape) for name, shape in self.manifest["outputs"].items()}

    @cached_property
    def shards(self) -> dict[str, list[ShardReader]]:
        """The planned shards by split, in the order of their names. UserError where one is missing."""
        manifest.check_decoding(self.root, self.manifest, self.images.decoding)
        found: dict[str, list[ShardReader]] = {"train": [], "validation": []}
        missing, codecs = [], by_split(self.manifest["codec"])
        for shard in sorted(self.images.shards(), key=lambda s: s.name):
            finished = sidecar.finished(self.root, shard, self.identity, codecs[shard.split])
            if finished is None:
                missing.append(shard.name)
            else:
                group = self.images.group(shard.name)
                found[shard.split].append(ShardReader(shard, finished, group, self.shapes))
        if missing:
            raise UserError(
                f"{self.root}: {len(missing)} shards are not cached yet, or hold other images by now, '{missing[0]}' "
                f"first; run `fmdistill cache RECIPE`"
            )
        return found

    def head(self) -> Any:
        """Return the teacher's small head, kept beside the shards: HEADS names its class by the family."""
        try:
            return load_head(self.family, self.root)
        except UserError as error:
            raise UserError(f"{error}; `fmdistill cache RECIPE` writes it anew") from None
