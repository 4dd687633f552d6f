"""Write one output shard: the unit of work, of failure and of scheduling. It appears whole or not at all.

A shard is NAME.tar, which webdataset's TarWriter writes, and its sidecar NAME.json, written last: keys, offsets,
checksums, image hashes, sizes, and per-channel statistics. Neither holds a clock or a host. A map (C, g, g) is a
member of its own, `escape(key)`.OUTPUT.npy; who reads the tar with webdataset gets the key back by
`fmdistill.images.unescape(__key__)`. Vectors (D,) are the rows of one member OUTPUT.npy (n, D) at the tar's end, in
the order of the sidecar's samples, whose records point at the rows. Its last member is `seal`'s.

How numpy reads a member, or such a stack of rows, by the sidecar's "codecs", after `x = np.load(file)`:

    fp32, fp16    x
    bf16          (x.astype("<u4") << 16).view("<f4")
    int8          x["value"] * x["scale"][..., None].astype("<f4")
    int4          as int8, of np.stack([x["value"] << 4 >> 4, x["value"] >> 4], -1).reshape(*x.shape, -1) for the value

int4 of an odd width ends in one more zero. With "-trimmed" a map is the upper left rectangle (C, h, w) of valid tokens.
The similarities (2, g, g) that `cache.similarity` adds to a map are whole and fp16 in every shard.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from isal.isal_zlib import crc32  # zlib's, nine times as fast
from torch import Tensor

from fmdistill.cache import sidecar
from fmdistill.cache.codec import Codec, stacked
from fmdistill.cache.outputs import StoredOutput, codecs_of
from fmdistill.cache.shard_tar import ShardTar
from fmdistill.cache.statistics import Statistics, rectangle
from fmdistill.cache.store import Store
from fmdistill.files import naming, publish, temporary_name, write_temporary
from fmdistill.images import Shard, escape


@dataclass
class TeacherInput:
    """One image of a shard, prepared for the teacher, or the problem with it."""

    index: int
    key: str
    image_hash: str
    label: int | None = None
    original: tuple[int, int] = (0, 0)
    resized: tuple[int, int] = (0, 0)
    pixels: Tensor | None = None
    conversions: tuple[str, ...] = ()
    captions: Sequence[str] = ()  # those that are embedded
    problem: str = ""


class ShardWriter:
    """Collects the outputs of one shard under a temporary name and publishes them together."""

    def __init__(self, store: Store, shard: Shard, identity: str, outputs: Mapping[str, StoredOutput]) -> None:
        self.store, self.path = store, store.folder / f"{shard.name}.tar"
        self.shard, self.identity = shard, identity
        self.outputs, self.codecs = outputs, codecs_of(outputs, shard.split)
        self.temporary = temporary_name(self.path)
        self.file = open(self.temporary, "xb")
        self.tar = ShardTar(self.path, self.file)
        self.samples: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self.rows: dict[str, list[bytes]] = {}  # by output, until the tar's end
        self.widths: dict[str, int] = {}  # of the rows
        self.statistics = Statistics()

    def fail(self, item: TeacherInput, problem: str) -> None:
        """Record an image that has no output, and why."""
        self.failed.append({"key": item.key, "index": item.index, "problem": problem})

    def add(self, item: TeacherInput, outputs: dict[str, np.ndarray], valid: np.ndarray) -> None:
        """Append one image's outputs; a value that the codec cannot hold is recorded as a failure."""
        kept = {name: cut(array, self.codecs[name], valid) for name, array in outputs.items()}
        try:
            members = {
                name: codec.pack(array).tobytes() if stacked(array.shape) else codec.encode(array)
                for name, array in kept.items()
                for codec in [self.codecs[name]]
            }
        except OverflowError as error:
            return self.fail(item, f"non-finite output: {error}; cache.codec=fp32 holds it")
        sample: dict[str, Any] = {
            "key": item.key,
            "index": item.index,
            "image": item.image_hash,
            "original": list(item.original),
            "resized": list(item.resized),
            "outputs": {},
        }
        if item.label is not None:
            sample["label"] = item.label
        for name, data in members.items():
            shape = kept[name].shape
            if stacked(shape):
                rows = self.rows.setdefault(name, [])
                offset = len(rows) * len(data)  # its place in the tar is known at the end
                rows.append(data)
                self.widths[name] = shape[0]
            else:
                offset = self.tar.add(escape(item.key), f"{name}.npy", data)
            record = {"offset": offset, "size": len(data), "crc32": crc32(data)}
            sample["outputs"][name] = {**record, "shape": list(shape)} if shape != outputs[name].shape else record
            self.statistics.add(name, outputs[name], valid if self.outputs[name].tokens == "image" else None)
        self.samples.append(sample)

    def _stack(self) -> None:
        for name, rows in self.rows.items():
            header = self.codecs[name].header((len(self.samples), self.widths[name]))
            start = self.tar.add(name, "npy", b"".join((header, *rows))) + len(header)
            for sample in self.samples:
                sample["outputs"][name]["offset"] += start

    def publish(self) -> None:
        """Finish the tar, publish it first-wins and its sidecar last."""
        self._stack()
        sealed = self.tar.end()
        with naming(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        fields = {
            "identity": self.identity,
            "take": self.shard.take,
            "split": self.shard.split,
            "codecs": {name: codec.label for name, codec in self.codecs.items()},
            "bytes": self.temporary.stat().st_size,
            "sha256": self.tar.sha256,
            "seal": sealed,
            "samples": self.samples,
            "failed": self.failed,
            "statistics": self.statistics.to_json(),
        }
        self._publish(sidecar.write(fields))

    def _publish(self, text: str) -> None:
        beside = self.path.with_suffix(".json")
        # On disk before the tar is seen, so that it follows the tar at once, and a full disk leaves no tar without it.
        described = write_temporary(beside, text)
        try:
            if not self.path.exists():
                beside.unlink(missing_ok=True)  # of a damaged tar that was deleted: it describes other bytes
            if publish(self.temporary, self.path):
                publish(described, beside)
            elif sidecar.finished(self.store, self.shard, self.identity, self.outputs):
                self.temporary.unlink()
            else:
                # The existing tar is a dead writer's, a shorter one, or another split's. A writer that replaces a tar
                # replaces its sidecar too. If two do so at once, or one dies between the two calls, the seals differ,
                # and the next run writes the shard again.
                os.replace(self.temporary, self.path)
                os.replace(described, beside)
        finally:
            described.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Remove what was written; nothing of it was visible."""
        try:
            self.file.close()
        except OSError:  # a full disk, again
            pass
        self.temporary.unlink(missing_ok=True)


def cut(array: np.ndarray, codec: Codec, valid: np.ndarray) -> np.ndarray:
    """Return what `codec` stores of an output: all, or of a map the rectangle of valid tokens."""
    if not codec.trim:
        return array
    size = rectangle(valid)
    assert size is not None, "what is valid is no upper left rectangle"
    return array[:, : size[0], : size[1]]


def image_hash(data: bytes) -> str:
    """Return the hash by which training recognises the image that the teacher saw."""
    return hashlib.blake2b(data, digest_size=12).hexdigest()
