"""Read a cache: shards opened by their sidecars, members by offset, each checked at its first read in a process."""

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal.isal_zlib import crc32  # zlib's, nine times as fast

from fmdistill.cache import manifest, sidecar
from fmdistill.cache.codec import padded
from fmdistill.cache.outputs import StoredOutput, codecs_of, from_json
from fmdistill.cache.sidecar import Finished
from fmdistill.cache.store import Store
from fmdistill.images import Images, Shard
from fmdistill.recipe import Component
from fmdistill.registry import UserError
from fmdistill.teachers import family_of_cache
from fmdistill.teachers.family import Family, Preprocess
from fmdistill.teachers.output import Shape


class ShardReader:
    """One finished shard: keys and sizes from the sidecar, outputs from the tar."""

    def __init__(
        self, store: Store, shard: Shard, finished: Finished, group: str, outputs: Mapping[str, StoredOutput]
    ) -> None:
        self.store, self.name, self.path, self.group, fields = store, shard.name, finished.tar, group, finished.fields
        self.samples = [s for s in fields["samples"] if shard.take is None or s["index"] < shard.take]
        self.outputs, self.codecs = outputs, codecs_of(outputs, fields["split"])
        self.sha256, self.statistics = fields["sha256"], fields["statistics"]  # of all images in the tar
        self.shapes = {name: output.shape for name, output in outputs.items()}
        self._owner = object()  # not the path: a shard that is written anew is another file
        self._checked: set[int] = set()

    @property
    def keys(self) -> list[str]:
        """The samples' keys, in order."""
        return [sample["key"] for sample in self.samples]

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Return one sample's outputs, such as {"embedding": float32 (C, g, g)}, of the cache's `shapes`."""
        shapes = {name: self.shape(index, name) for name in self.samples[index]["outputs"]}
        slots = {name: np.empty(self.codecs[name].nbytes(shape), np.uint8) for name, shape in shapes.items()}
        self.read_into(index, slots)
        values = {
            name: self.codecs[name].unpack(torch.from_numpy(slots[name]), shape) for name, shape in shapes.items()
        }
        return {name: padded(value, self.shapes[name]).numpy() for name, value in values.items()}

    def shape(self, index: int, output: str) -> Shape:
        """Return the shape in which one sample's output is stored: the cache's, or that of its valid tokens."""
        shape, whole = self.samples[index]["outputs"][output].get("shape"), self.shapes[output]
        if shape is None:
            return whole
        if len(shape) != len(whole) or any(a > b for a, b in zip(shape, whole, strict=True)):
            raise UserError(
                f"{self.path}: its sidecar gives {output} the shape {shape}; delete both, run `fmdistill cache`"
            )
        return tuple(shape)

    def read_into(self, index: int, slots: Mapping[str, np.ndarray]) -> None:
        """Fill each output's slot, uint8 of as many bytes as its codec gives its `shape`, with what is stored."""
        file, sample = self.store.read(self.path.name, self.sha256, self._owner), self.samples[index]
        for name, member in sample["outputs"].items():
            if not self._fill(file.number, member, slots[name].data, index in self._checked):
                raise UserError(
                    f"{self.path}: the {name} of '{sample['key']}' is damaged (checksum); "
                    f"delete this file and run `fmdistill cache` again"
                )
        self._checked.add(index)

    @property
    def address(self) -> str:
        """Where the tar is: behind a URL the local file is a copy."""
        return self.store.address(self.path.name)

    def fetch(self) -> Path:
        """Return the tar's local path, downloading it first if needed."""
        return self.store.fetch(self.path.name, self.sha256)

    @staticmethod
    def _fill(file: int, member: Mapping[str, Any], data: memoryview, checked: bool) -> bool:
        """Read a member's data, after its .npy header, into `data`; return whether it is whole."""
        before = member["size"] - len(data)  # 0 for a row of a member that holds many
        if before < 0:
            return False
        if checked:
            return os.preadv(file, [data], member["offset"] + before) == len(data)
        header = bytearray(before)
        whole = os.preadv(file, [header, data], member["offset"]) == member["size"]
        return whole and crc32(data, crc32(header)) == member["crc32"]


class Cache:
    """A finished cache, opened for the images that a recipe plans.

    `teacher` is the recipe's teacher, which names a family of another package; fmdistill's own are known without it.
    """

    def __init__(self, store: Store, images: Images, teacher: Component | None = None) -> None:
        self.store, self.root, self.images, self.teacher = store, store.folder, images, teacher
        self.manifest = manifest.read(self.root)

    @cached_property
    def identity(self) -> str:
        """Hash of the manifest; every sidecar repeats it."""
        return manifest.identity_hash(self.manifest)

    @property
    def family(self) -> str:
        """The name of the teacher's family, the prefix of its outputs."""
        return self.manifest["family"]

    @cached_property
    def record(self) -> Family:
        """The teacher's family."""
        return family_of_cache(self.family, self.teacher)

    @cached_property
    def preprocess(self) -> Preprocess:
        """The teacher's preprocessing, which the student shares."""
        return self.record.preprocess.from_json(self.manifest["teacher"]["preprocess"])

    @cached_property
    def outputs(self) -> dict[str, StoredOutput]:
        """What is stored of each output of the teacher, by its name."""
        return from_json(self.manifest["outputs"])

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each output of one image."""
        return {name: output.shape for name, output in self.outputs.items()}

    @cached_property
    def shards(self) -> dict[str, list[ShardReader]]:
        """The planned shards by split, in the order of their names. Raises UserError if one is missing."""
        manifest.check_decoding(self.root, self.manifest, self.images.decoding)
        readers: dict[str, list[ShardReader]] = {"train": [], "validation": []}
        missing = []
        for shard in sorted(self.images.shards(), key=lambda s: s.name):
            finished = sidecar.finished(self.store, shard, self.identity, self.outputs)
            if finished is None:
                missing.append(shard.name)
            else:
                group = self.images.group(shard.name)
                readers[shard.split].append(ShardReader(self.store, shard, finished, group, self.outputs))
        if missing:
            raise UserError(
                f"{self.root}: {len(missing)} shards are not cached yet, or hold other images by now, '{missing[0]}' "
                f"first; run `fmdistill cache RECIPE`"
            )
        return readers

    def head(self) -> Any:
        """Return the teacher's small head, stored beside the shards, of the class that its family names."""
        if self.record.head is None:
            raise UserError(f"{self.root}: a teacher of the family '{self.family}' has no head")
        try:
            return self.record.head.load(self.root)
        except UserError as error:
            raise UserError(f"{error}; `fmdistill cache RECIPE` writes it anew") from None
