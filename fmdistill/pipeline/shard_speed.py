"""Measure the speed of codecs, and of writing and reading shards, compared with plain files of the same bytes."""

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
from fmdistill.recipe import CacheSettings, CodecName
from fmdistill.teachers.output import Output

CPU = torch.device("cpu")


def measure_codec(name: str, outputs: Mapping[str, np.ndarray], rounds: int) -> list[Measurement]:
    """Measure how fast the codec `name` encodes and decodes `outputs`, float32 (B, ...) by name."""
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
    speeds = rates(works, CPU, rounds, sum(array.nbytes for array in arrays) / 1e6)
    return [Measurement(f"{name}: {what}", rate, "MB/s of float32") for what, rate in speeds.items()]


def measure_shards(
    name: CodecName,
    values: Mapping[str, np.ndarray],
    outputs: Mapping[str, Output],
    valid: np.ndarray,
    folder: Path,
    megabytes: float,
    rounds: int,
) -> list[Measurement]:
    """Measure the size of a shard of the codec, and how fast it is written and read compared with plain files.

    `values` are float32 (B, ...) by output, of images with the token masks `valid` (B, g, g).
    """
    entries = stored(outputs, CacheSettings(root=str(folder), codec=name))
    count, counter = len(valid), numbers()
    image_bytes = sum(value[0].nbytes for value in values.values())
    total = max(count, round(megabytes * 1e6 / image_bytes))
    tars: list[Path] = []

    def write() -> None:
        writer = ShardWriter(Folder(folder), Shard(f"{name}-{next(counter)}", "train"), "", entries)
        for index in range(total):
            item = TeacherInput(index, f"image-{index:07}", "", original=(1, 1), resized=(1, 1))
            writer.add(item, {k: v[index % count] for k, v in values.items()}, valid[index % count])
        writer.publish()
        tars.append(writer.path)

    write()
    data = tars[0].read_bytes()
    fields = sidecar.read(tars[0].with_suffix(".json"))
    assert fields is not None, "just written"
    if len(fields["samples"]) < total:
        return []  # the codec cannot encode the values, as `measure_codec` reports
    shard, finished = Shard(tars[0].stem, "train"), sidecar.Finished(tars[0], fields)
    readers = [ShardReader(Folder(folder), shard, finished, "", entries)]

    def first() -> None:
        readers.append(ShardReader(Folder(folder), shard, finished, "", entries))
        later()

    def later() -> None:
        for index in range(total):
            readers[-1].read(index)

    reading = {"first": first, "later": later, "plain": lambda: tars[0].read_bytes()}
    writes = take_turns({"write": write, "plain": lambda: _write_synced(folder, data)}, CPU, rounds, waits=True)
    reads = take_turns(reading, CPU, rounds)  # from the page cache, so without waiting for the disk
    for path in tars:
        path.unlink()
    size, planned = len(data) / 1e6, tar_bytes(codecs_of(entries, "train"), outputs, total) / total
    plain_write, plain_read = size / writes["plain"], size / reads["plain"]
    return [
        Measurement(f"{name}: an image in a shard", len(data) / total, "bytes", "as `plan` counts", planned),
        Measurement(f"{name}: write a shard", size / writes["write"], "MB/s", "its bytes, synced", plain_write),
        Measurement(f"{name}: read, with checksums", total / reads["first"], "embeddings/s"),
        Measurement(f"{name}: read again", total / reads["later"], "embeddings/s"),
        Measurement(f"{name}: read again, bytes", size / reads["later"], "MB/s", "the file's bytes", plain_read),
    ]


def _write_synced(folder: Path, data: bytes) -> None:
    with open(folder / "plain", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
