"""Time the cache's reader against webdataset's decoded pipeline: embeddings per second into the same batch tensors.

    OMP_NUM_THREADS=1 python benchmarks/reading.py

Writes shards of random 64x64x256 embeddings into a temporary folder (0.5 GB) and reads them from the page cache in this
process, both readers alternating; prints a markdown table of the minimum times. The cache's reader is timed with the
checksums of a process's first epoch, and without them as in later epochs.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from torch import Tensor

from fmdistill.cache import outputs, sidecar
from fmdistill.cache.batch import BufferPool, read_outputs
from fmdistill.cache.codec import named
from fmdistill.cache.reader import ShardReader
from fmdistill.cache.store import Folder
from fmdistill.cache.writer import ShardWriter, TeacherInput
from fmdistill.images import Shard
from fmdistill.recipe import CacheSettings
from fmdistill.teachers.output import Output

SHAPE, SHARDS, IMAGES, BATCH, ROUNDS = (256, 64, 64), 2, 64, 16, 9
LABELS = ("fp32", "fp16", "int8", "int8-trimmed", "int4")
VALID = (43, 64)  # of a 3:2 image


def write(root: Path, label: str) -> list[ShardReader]:
    """Write shards with the codec `label`; return their readers."""
    codec, rng, readers = named(label), np.random.default_rng(0), []
    valid = np.zeros(SHAPE[1:], bool)
    valid[: VALID[0], : VALID[1]] = True
    for number in range(SHARDS):
        shard = Shard(f"{label}-{number}", "train")
        stored = outputs.stored(
            {"embedding": Output(SHAPE, "image")}, CacheSettings(str(root), codec.name, trim=codec.trim)
        )
        writer = ShardWriter(Folder(root), shard, "benchmark", stored)
        writer.statistics.add = lambda *_: None  # type: ignore[method-assign]
        for index in range(IMAGES):
            array = rng.standard_normal(SHAPE, dtype=np.float32)
            item = TeacherInput(index, f"image-{index:03d}", "0", None, (1, 1), (1, 1))
            writer.add(item, {"embedding": array}, valid)
        writer.publish()
        finished = sidecar.finished(Folder(root), shard, "benchmark", stored)
        assert finished is not None, "just written"
        readers.append(ShardReader(Folder(root), shard, finished, "", stored))
    return readers


def cache_batches(readers: list[ShardReader], pool: BufferPool) -> Iterator[Tensor]:
    """Yield batches in stored form, as `CachedImages` passes them to a loader; `pool` is its process's."""
    places = [(reader, index) for reader in readers for index in range(IMAGES)]
    for start in range(0, len(places), BATCH):
        yield read_outputs(places[start : start + BATCH], pool)["data"]["embedding"]


def unchecked(readers: list[ShardReader]) -> list[ShardReader]:
    """Return the readers in the state of a new process, which has checked no checksum yet."""
    for reader in readers:
        reader._checked.clear()
    return readers


def webdataset_batches(readers: list[ShardReader]) -> Iterator[Tensor]:
    """Yield the same batches from webdataset, decoded and stacked by its own collation."""
    loaded = webdataset.WebDataset([str(reader.path) for reader in readers], shardshuffle=False).decode()
    for (stored,) in loaded.to_tuple("embedding.npy").batched(BATCH):
        yield torch.from_numpy(stored.reshape(-1).view(np.uint8))


def race(*works: Callable[[], Iterator[Tensor]]) -> list[float]:
    """Return each work's minimum seconds over ROUNDS runs; they alternate, so that noise affects all equally."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, spent in zip(works, seconds, strict=True):
            start = time.perf_counter()
            for _batch in work():
                pass
            spent.append(time.perf_counter() - start)
    return [min(spent) for spent in seconds]


def main() -> None:
    """Print one row per codec."""
    count = SHARDS * IMAGES
    print(
        f"{count} embeddings of {SHAPE}, batches of {BATCH}, {torch.get_num_threads()} thread(s), least of {ROUNDS}\n"
    )
    print("| codec | MB a map | webdataset /s | cache, checksums /s | ratio | cache, later epochs /s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for label in LABELS:
        with tempfile.TemporaryDirectory() as folder:
            readers = write(Path(folder), label)
            pool = BufferPool()
            for a, b in zip(cache_batches(readers, pool), webdataset_batches(readers), strict=True):
                assert torch.equal(a, b), "the two readers give different batches"
            size = readers[0].samples[0]["outputs"]["embedding"]["size"] / 1e6
            slow, first, later = race(
                lambda r=readers: webdataset_batches(r),
                lambda r=readers, p=pool: cache_batches(unchecked(r), p),
                lambda r=readers, p=pool: cache_batches(r, p),
            )
        print(
            f"| {label} | {size:.2f} | {count / slow:.0f} | {count / first:.0f} | {slow / first:.1f} "
            f"| {count / later:.0f} | {slow / later:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
