"""A real cache, read by two processes with two loading workers each: the order is that of the pure function."""

import io
import multiprocessing

import numpy as np
import PIL.Image
import pytest
import tiny
from test_images_tar import pack

from fmdistill import cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.cache.order import Batches, epoch_order
from fmdistill.distill import loader
from fmdistill.recipe import Recipe

COUNTS = (7, 1, 12, 3, 9, 5, 4)  # 41 images
BATCH, SEED, WINDOW, EPOCHS = 6, 3, 2, 3
STEPS = sum(COUNTS) // BATCH  # of an epoch, which drops five images
FORK = multiprocessing.get_context("fork")


def picture(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """A finished cache of seven training shards of uneven size."""
    folder, rng = tmp_path_factory.mktemp("uneven"), np.random.default_rng(0)
    for name, count in [*((f"t{n}", count) for n, count in enumerate(COUNTS)), ("v", 2)]:
        (folder / f"{name}.tar").write_bytes(pack({f"{name}_{i}.png": picture(rng) for i in range(count)}))
    train = ",".join(f"t{n}.tar" for n in range(len(COUNTS)))
    tars = ["images.name=tar", f"images.root={folder}", f"images.train=[{train}]", "images.validation=[v.tar]"]
    made = tiny.load(folder, *tars)
    cache.run(made)
    return made


def read(recipe: Recipe, rank: int, world: int, start: int, workers: int, pipe) -> None:
    """Send the keys of each batch of this process from step `start` on."""
    images = CachedImages(cache.open_cache(recipe), "train")
    plan = Batches(images.counts, BATCH, SEED, WINDOW, rank, world)
    pipe.send([b["keys"] for b in loader.batches(images, plan.between(start, EPOCHS * STEPS), workers)])


def together(recipe: Recipe, world: int, start: int, workers: int) -> list[list[list[str]]]:
    """Return by process what `world` processes that run at once read."""
    started = []
    for rank in range(world):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=read, args=(recipe, rank, world, start, workers, theirs))
        process.start()
        started.append((process, ours))
    found = []
    for process, ours in started:
        assert ours.poll(60), "a process reads nothing"
        found.append(ours.recv())
        process.join(60)
        assert process.exitcode == 0
    return found


@pytest.fixture(scope="module")
def parts(recipe):
    return together(recipe, world=2, start=0, workers=2)


def pure(recipe: Recipe, epoch: int) -> list[str]:
    keys = [shard.keys for shard in cache.open_cache(recipe).shards["train"]]
    assert tuple(map(len, keys)) == COUNTS
    return [keys[shard][index] for shard, index in epoch_order(COUNTS, SEED, epoch, WINDOW)]


def test_two_processes_of_two_workers_read_the_pure_function_s_order_in_equal_batches(recipe, parts):
    assert all(len(part) == EPOCHS * STEPS and {len(keys) for keys in part} == {BATCH // 2} for part in parts)
    dropped = []
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS, (epoch + 1) * STEPS)
        found = [key for step in steps for part in parts for key in part[step]]
        wanted = pure(recipe, epoch)
        assert found == wanted[: STEPS * BATCH]
        assert len(set(found)) == len(found) == sum(COUNTS) - sum(COUNTS) % BATCH  # each at most once, all but the rest
        dropped.append(frozenset(wanted) - set(found))
        assert len(dropped[-1]) == sum(COUNTS) % BATCH
    assert len(set(dropped)) > 1
    orders = [tuple(key for keys in parts[0][e * STEPS : (e + 1) * STEPS] for key in keys) for e in range(EPOCHS)]
    assert len(set(orders)) == EPOCHS


@pytest.mark.parametrize(("world", "workers"), [(2, 1), (2, 3), (1, 2)])
def test_a_resumed_epoch_goes_on_with_the_very_next_sample_whatever_the_workers_and_processes(
    recipe, parts, world, workers
):
    start = STEPS + 2  # in the middle of the second epoch
    again = together(recipe, world, start, workers)
    whole = [[key for part in parts for key in part[step]] for step in range(start, EPOCHS * STEPS)]
    assert [[key for part in again for key in part[step]] for step in range(len(whole))] == whole
