"""Kill a teacher pass with SIGKILL at random moments, and check that the cache still ends up identical in every byte.

Run: OMP_NUM_THREADS=1 python benchmarks/kills.py [one=30 two=30 race=30 publish=20 ray=10] [seed=0]
Five situations, each with the given number of kills: one process; two that share the shards; two that race for the same
shard; one that is killed between the calls that write files to disk, which random moments seldom hit; Ray actors. After
a few kills each cache is completed and every file compared with those of an undisturbed cache. Processes other than
actors are forked from this one, which has imported torch but never computed with it, so they start quickly.
"""

import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import segment_anything.modeling as sam
import torch

from fmdistill import cache, files, recipe
from fmdistill.images import Encoded
from fmdistill.mini.photos import Photos
from fmdistill.teachers.sam import SamTeacher

FORK = multiprocessing.get_context("fork")
PER_CACHE = 5  # kills before a cache is completed
RECIPE = """
out: {folder}/run
images: {{name: "kills:Photographs", train: 48, validation: 16, size: 64, shard_size: 8}}
teacher: {{name: "kills:teacher"}}
cache: {{root: {folder}/cache, max_failed: 0.05}}
student: {{name: tinyvit_sam}}
task: {{name: distill}}
optimizer: {{name: adamw}}
schedule: {{name: cosine}}
train: {{steps: 1}}
"""


class Photographs(Photos):
    """The packaged photographs, of which one cannot be decoded, so that its sidecar entry is compared too."""

    def read(self, shard: str) -> Iterator[Encoded]:
        """Yield the shard's images in order."""
        for image in super().read(shard):
            yield replace(image, data=b"no image") if image.key == "astronaut-0000" else image


def teacher() -> SamTeacher:
    """Return a teacher with segment_anything's encoder at 64 px and random weights from a fixed seed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = sam.ImageEncoderViT(
        img_size=64, embed_dim=16, depth=2, num_heads=2, out_chans=32, global_attn_indexes=(1,)
    )
    prompts = sam.PromptEncoder(embed_dim=32, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=4)
    transformer = sam.TwoWayTransformer(depth=1, embedding_dim=32, mlp_dim=32, num_heads=2)
    decoder = sam.MaskDecoder(transformer_dim=32, transformer=transformer)
    return SamTeacher(sam.Sam(encoder, prompts, decoder), name="toy", device="cpu", dtype="fp32", batch=2, workers=1)


def load(folder: Path, *overrides: str) -> recipe.Recipe:
    """Write and return a recipe whose cache is in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.yaml").write_text(RECIPE.format(folder=folder))
    return recipe.load(folder / "toy.yaml", overrides)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a cache but its recipe, which contains the folder's path."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != recipe.SAVED}


def start(folder: Path, rank: int = 0, world: int = 1, last: int | None = None) -> multiprocessing.Process:
    """Start caching in a forked process, one of `world`; it kills itself at call number `last` that writes to disk."""

    def work() -> None:
        if last is not None:
            _die_at(last)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 2)
        cache.run(load(folder))

    process = FORK.Process(target=work)
    process.start()
    return process


def _die_at(last: int) -> None:
    calls = itertools.count()

    def deadly(function: Callable) -> Callable:
        def call(*arguments: object, **named: object) -> object:
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    for name in ("fsync", "link", "replace", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))


def strike_publishing(folder: Path, kills: int, rng: random.Random, whole: float) -> int:
    """Let one process after another kill itself at one of its first 16 calls, about two shards' worth; then finish."""
    for _ in range(kills):
        process = start(folder, last=rng.randrange(16))
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    return kills


def strike(folder: Path, kills: int, rng: random.Random, whole: float, ranks: list[tuple[int, int]]) -> int:
    """Run processes with these (rank, world), killing and restarting random ones; return the number of kills."""
    running = {n: start(folder, *ranks[n]) for n in range(len(ranks))}
    struck = 0
    while struck < kills:
        time.sleep(rng.uniform(0, 0.5 * whole))
        victim = rng.randrange(len(ranks))
        if running[victim].is_alive():
            os.kill(running[victim].pid or 0, signal.SIGKILL)
        running[victim].join()
        struck += running[victim].exitcode == -signal.SIGKILL
        if running[victim].exitcode == 0 and all(p.exitcode == 0 for p in running.values()):
            break  # all have finished; the remaining kills strike another cache
        running[victim] = start(folder, *ranks[victim])
    for process in running.values():
        process.join()
        assert process.exitcode == 0, f"a process ended with {process.exitcode}"
    return struck


def strike_actor(folder: Path, kills: int, rng: random.Random, whole: float) -> int:
    """Run the cache stage with two Ray actors, killing a random active one `kills` times; return the kills."""
    done, struck = threading.Event(), 0

    def work() -> None:
        cache.run(load(folder, "cache.executor.name=ray", "cache.executor.actors=2", "cache.executor.retries=100"))
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while struck < kills and thread.is_alive():
        time.sleep(0.001)
        active = {int(path.name.split(".")[-3]) for path in (folder / "cache").glob(f".*.tar.{files._host()}.*.tmp")}
        if active:  # wait, so that the kill falls anywhere in this shard or the next
            time.sleep(rng.uniform(0, 0.2 * whole))
            try:
                os.kill(rng.choice(sorted(active)), signal.SIGKILL)
                struck += 1
            except ProcessLookupError:  # the file of a dead process
                pass
    thread.join()
    assert done.is_set(), "the run failed"
    return struck


SITUATIONS: dict[str, Callable[..., int]] = {
    "one": lambda *arguments: strike(*arguments, [(0, 1)]),
    "two": lambda *arguments: strike(*arguments, [(0, 2), (1, 2)]),
    "race": lambda *arguments: strike(*arguments, [(0, 1), (0, 1)]),
    "publish": strike_publishing,
    "ray": strike_actor,
}


def run(situation: str, kills: int, seed: int, folder: Path, whole: float, expected: dict[str, bytes]) -> int:
    """Repeat the situation until `kills` kills were made; return the number of caches, all equal to `expected`."""
    rng, struck, caches = random.Random(f"{seed} {situation}"), 0, 0
    while struck < kills:
        subfolder = folder / f"{situation}-{caches}"
        struck += SITUATIONS[situation](subfolder, min(PER_CACHE, kills - struck), rng, whole)
        cached = contents(subfolder / "cache")
        differ = sorted({name for name, _ in set(cached.items()) ^ set(expected.items())})
        assert not differ, f"{subfolder}: other bytes, or on one side only: {', '.join(differ)}"
        caches += 1
        print(f"{situation}: {struck} kills, {caches} caches equal", flush=True)
    return caches


def main(arguments: list[str]) -> None:
    """Run every situation and print its number of kills and caches."""
    counts = {"one": 30, "two": 30, "race": 30, "publish": 20, "ray": 10, "seed": 0}
    counts |= {key: int(value) for key, value in (argument.split("=") for argument in arguments)}
    seed = counts.pop("seed")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as temporary:
        folder = Path(temporary)
        began = time.monotonic()
        first = start(folder / "undisturbed")
        first.join()
        assert first.exitcode == 0
        whole, expected = time.monotonic() - began, contents(folder / "undisturbed/cache")
        print(f"undisturbed: {len(expected)} files in {whole:.2f} s", flush=True)
        for situation, kills in counts.items():
            if situation == "ray" and kills:
                _start_ray()
            began = time.monotonic()
            caches = run(situation, kills, seed, folder, whole, expected) if kills else 0
            print(f"{situation}: {kills} kills, {caches} caches, {time.monotonic() - began:.0f} s", flush=True)


def _start_ray() -> None:
    """Start Ray with this folder on its actors' path, so that they can import the toy teacher."""
    import ray

    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1:])
