"""Time the shard writer by codec: images per second of one process on one core, and the time of each part.

    OMP_NUM_THREADS=1 python benchmarks/writing.py [folder=/dev/shm] [rounds=9]

Writes shards of 32 random 256x64x64 maps into `folder` (by default a temporary one) without syncing. Measures this
process's CPU time, the minimum over the rounds, in which the codecs alternate; so other load on the machine has little
effect, and a slow disk none. "Statistics", "codec" and "checksums" (crc32 and sha256) are timed by themselves on the
same images; "file" is the rest of the total. Prints a markdown table.
"""

import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from isal.isal_zlib import crc32

from fmdistill.cache import outputs
from fmdistill.cache.codec import Codec, named
from fmdistill.cache.statistics import Statistics
from fmdistill.cache.store import Folder
from fmdistill.cache.writer import ShardWriter, TeacherInput, cut
from fmdistill.images import Shard
from fmdistill.recipe import CacheSettings
from fmdistill.teachers.output import Output

SHAPE, IMAGES = (256, 64, 64), 32
LABELS = ("fp32", "fp16", "bf16", "int8", "int4", "int8-trimmed")
VALID = (43, 64)  # tokens of a 3:2 image, which a trimmed codec stores


def write(root: Path, codec: Codec, arrays: list[np.ndarray], valid: np.ndarray) -> float:
    """Return the CPU seconds of adding the images to a shard, which is not published: that would wait for the disk."""
    stored = outputs.stored(
        {"embedding": Output(SHAPE, "image")}, CacheSettings(str(root), codec.name, trim=codec.trim)
    )  # type: ignore[arg-type]
    writer = ShardWriter(Folder(root), Shard("shard", "train"), "benchmark", stored)
    start = time.process_time()
    for index, array in enumerate(arrays):
        item = TeacherInput(index, f"image-{index:07}", "0", None, (1, 1), (1, 1))
        writer.add(item, {"embedding": array}, valid)
    spent = time.process_time() - start
    writer.abandon()
    return spent


def timed(work: Callable[[np.ndarray], object], arrays: list[np.ndarray]) -> float:
    """Return the CPU seconds that `work` takes for all arrays together."""
    start = time.process_time()
    for array in arrays:
        work(array)
    return time.process_time() - start


def parts(codec: Codec, arrays: list[np.ndarray], valid: np.ndarray) -> dict[str, float]:
    """Return the CPU seconds of each part of the writer."""
    stored = [cut(array, codec, valid) for array in arrays]
    data, digest, statistics = codec.encode(stored[0]), hashlib.sha256(), Statistics()
    return {
        "statistics": timed(lambda array: statistics.add("embedding", array, valid), arrays),
        "codec": timed(codec.encode, stored),
        "checksums": timed(lambda _: (crc32(data), digest.update(data)), arrays),
    }


def main() -> None:
    """Print one row per codec."""
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    rounds, torch_threads = int(settings.get("rounds", 9)), torch.get_num_threads()
    root = Path(tempfile.mkdtemp(dir=settings.get("folder")))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(IMAGES)]
    everywhere, rectangle = np.ones(SHAPE[1:], bool), np.zeros(SHAPE[1:], bool)
    rectangle[: VALID[0], : VALID[1]] = True
    least: dict[str, dict[str, float]] = {label: {} for label in LABELS}
    try:
        for _ in range(rounds):
            for label in LABELS:
                codec = named(label)
                valid = rectangle if codec.trim else everywhere
                times = {"whole": write(root, codec, arrays, valid), **parts(codec, arrays, valid)}
                least[label] = {name: min(spent, least[label].get(name, spent)) for name, spent in times.items()}
    finally:
        shutil.rmtree(root)
    print(f"{IMAGES} maps of {SHAPE} into {root.parent}, {torch_threads} thread(s), least of {rounds} rounds\n")
    print("| codec | images/s | ms an image | statistics | codec | checksums | file |")
    print("|---|---|---|---|---|---|---|")
    for label, times in least.items():
        ms = {name: 1000 * spent / IMAGES for name, spent in times.items()}
        rest = ms["whole"] - ms["statistics"] - ms["codec"] - ms["checksums"]
        shown = [ms["whole"], ms["statistics"], ms["codec"], ms["checksums"], rest]
        print(f"| {label} | {1000 / ms['whole']:.0f} | {' | '.join(f'{value:.2f}' for value in shown)} |")


if __name__ == "__main__":
    main()
