"""How fast codecs work, and shards are written and read, beside plain files of the same bytes."""

import os
from collections.abc import Mapping
from itertools import count as numbers
from pathlib import Path

import numpy as np
import torch

from fmdistill.backbones.throughput import take_turns
from fmdistill.cache import sidecar
from fmdistill.cache.codec import CODECS
from fmdistill.cache.footprint import tar_bytes
from fmdistill.cache.outputs import codecs_of, stored
from fmdistill.cache.reader import ShardReader
from fmdistill.cache.store import Folder
from fmdistill.cache.writer import ShardWriter, TeacherInput
from fmdistill.images import Shard
from fmdistill.pipeline.measurement import Measurement, rates
from fmdistill.recipe import Cache, CodecName
from fmdistill.teachers.output import Output

CPU = torch.device("cpu")


def of_codec(name: str, outputs: Mapping[str, np.ndarray], rounds: int) -> list[Measurement]:
    """Return how fast the codec `name` turns float32 `outputs`, (B, ...) each by its name, into bytes and back."""
    codec = CODECS[name]
    arrays = [array for value in outputs.values() for array in value]
    try:
        members = [codec.pack(array) for array in arrays]
    except OverflowError as error:
        return [Measurement(f"{name}: {error}", 0.0, "MB/s")]
    works = {
        "encode": lambda: [codec.encode(array) for array in arrays],
        "decode": lambda: [codec.decode(member, array.shape) for member, array in zip(members, arrays, strict=True)],
    }
    found = rates(works, CPU, rounds, sum(array.nbytes for array in arrays) / 1e6)
    return [Measurement(f"{name}: {what}", rate, "MB/s of float32") for what, rate in found.items()]


def of_shards(
    name: CodecName,
    values: Mapping[str, np.ndarray],
    outputs: Mapping[str, Output],
    valid: np.ndarray,
    folder: Path,
    megabytes: float,
    rounds: int,
) -> list[Measurement]:
    """Return what a shard of the codec takes, and how fast it is written and read beside plain files of its bytes.

    `values` are float32 (B, ...) by output, of the images whose tokens are `valid` (B, g, g).
    """
    entries = stored(outputs, Cache(root=str(folder), codec=name))
    count, made = len(valid), numbers()
    each = sum(value[0].nbytes for value in values.values())
    total = max(count, round(megabytes * 1e6 / each))
    kept: list[Path] = []

    def write() -> None:
        writer = ShardWriter(Folder(folder), Shard(f"{name}-{next(made)}", "train"), "", entries)
        for index in range(total):
            item = TeacherInput(index, f"image-{index:07}", "", original=(1, 1), resized=(1, 1))
            writer.add(item, {k: v[index % count] for k, v in values.items()}, valid[index % count])
        writer.publish()
        kept.append(writer.path)

    write()
    data = kept[0].read_bytes()
    described = sidecar.read(kept[0].with_suffix(".json"))
    assert described is not None, "just written"
    if len(described["samples"]) < total:
        return []  # `of_codec` has said why
    shard, finished = Shard(kept[0].stem, "train"), sidecar.Finished(kept[0], described)
    opened = [ShardReader(Folder(folder), shard, finished, "", entries)]

    def first() -> None:
        opened.append(ShardReader(Folder(folder), shard, finished, "", entries))
        later()

    def later() -> None:
        for index in range(total):
            opened[-1].read(index)

    reading = {"first": first, "later": later, "plain": lambda: kept[0].read_bytes()}
    writes = take_turns({"write": write, "plain": lambda: _synced(folder, data)}, CPU, rounds, waits=True)
    reads = take_turns(reading, CPU, rounds)  # from memory, so nothing waits
    for path in kept:
        path.unlink()
    size, nominal = len(data) / 1e6, tar_bytes(codecs_of(entries, "train"), outputs, total) / total
    plain_write, plain_read = size / writes["plain"], size / reads["plain"]
    return [
        Measurement(f"{name}: an image in a shard", len(data) / total, "bytes", "as `plan` counts", nominal),
        Measurement(f"{name}: write a shard", size / writes["write"], "MB/s", "its bytes, synced", plain_write),
        Measurement(f"{name}: read, with checksums", total / reads["first"], "embeddings/s"),
        Measurement(f"{name}: read again", total / reads["later"], "embeddings/s"),
        Measurement(f"{name}: read again, bytes", size / reads["later"], "MB/s", "the file's bytes", plain_read),
    ]


def _synced(folder: Path, data: bytes) -> None:
    with open(folder / "plain", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
