"""The reader: few open files, in forks and from pickles, and never an old file for a new one."""

import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context

import numpy as np
import pytest
import tiny

from fmdistill import cache
from fmdistill.cache import reader
from fmdistill.registry import UserError


def test_few_tars_are_open_at_once_and_a_reader_works_in_a_fork_and_from_a_pickle(tmp_path, monkeypatch):
    def opened() -> int:
        return sum(".tar" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if alive(fd))

    def alive(fd: str) -> bool:
        return os.path.lexists(f"/proc/self/fd/{fd}")

    recipe = tiny.load(tmp_path, "images.shard_size=1")
    cache.run(recipe)
    monkeypatch.setattr(reader, "_opened", lru_cache(maxsize=3)(reader._opened.__wrapped__))
    shards = cache.open_cache(recipe).shards["train"]
    before = opened()
    expected = [shard.read(0)["embedding"] for shard in shards]
    assert len(shards) == 24 and opened() == before + 3
    for again in (shards, pickle.loads(pickle.dumps(shards))):
        assert all(np.array_equal(a.read(0)["embedding"], e) for a, e in zip(again, expected, strict=True))
    with ProcessPoolExecutor(2, get_context("fork"), initializer=inherit, initargs=(shards,)) as pool:
        found = list(pool.map(read_inherited, [*range(24), *range(24)]))
    assert all(np.array_equal(a, e) for a, e in zip(found, [*expected, *expected], strict=True))
    assert all(np.array_equal(a.read(0)["embedding"], e) for a, e in zip(shards, expected, strict=True))
    assert opened() == before + 3


def inherit(shards) -> None:
    globals()["inherited"] = shards


def read_inherited(number: int) -> np.ndarray:
    return globals()["inherited"][number].read(0)["embedding"]


def test_a_shard_written_anew_is_read_anew_in_the_same_process(tmp_path):
    recipe, path = tiny.load(tmp_path), tmp_path / "cache/train-000.tar"
    cache.run(recipe)
    first = cache.open_cache(recipe).shards["train"][0]
    expected = first.read(0)["embedding"]
    path.unlink()
    cache.run(recipe)
    damaged = bytearray(path.read_bytes())
    damaged[700] ^= 4
    path.write_bytes(damaged)
    assert np.array_equal(first.read(0)["embedding"], expected)
    with pytest.raises(UserError, match="damaged"):
        cache.open_cache(recipe).shards["train"][0].read(0)
