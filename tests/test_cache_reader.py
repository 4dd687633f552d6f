"""The reader: few open files, in forks and from pickles, and never an old file for a new one."""

import dataclasses
import json
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context

import numpy as np
import pytest
import tiny
import torch

from fmdistill import cache, distill
from fmdistill import recipe as recipes
from fmdistill.cache import store
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill.loader import batches
from fmdistill.registry import UserError


def test_few_tars_are_open_at_once_and_a_reader_works_in_a_fork_and_from_a_pickle(tmp_path, monkeypatch):
    def opened() -> int:
        return sum(".tar" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if alive(fd))

    def alive(fd: str) -> bool:
        return os.path.lexists(f"/proc/self/fd/{fd}")

    recipe = tiny.load(tmp_path, "images.shard_size=1")
    cache.run(recipe)
    monkeypatch.setattr(store, "held_open", lru_cache(maxsize=3)(store.held_open.__wrapped__))
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


@pytest.mark.parametrize(
    "codec, trim", [("fp32", False), ("fp16", True), ("bf16", False), ("int8", True), ("int4", True)]
)
def test_a_loader_s_batch_is_stored_in_one_tensor_an_output_and_decodes_to_what_each_sample_reads(
    tmp_path, codec, trim
):
    recipe = tiny.load(tmp_path, f"cache.codec={codec}", f"cache.trim={trim}".lower(), *EXCLUDE)
    cache.run(recipe)
    images = CachedImages(cache.open_cache(recipe), "train")
    places = [[(0, 2, 3), (0, 0, 1), (0, 1, 7)], [(0, 2, 0)]]
    for workers in (0, 1):
        for batch, chosen in zip(batches(images, places, workers), places, strict=True):
            items = [tiny.item(images, shard, index) for _, shard, index in chosen]
            assert batch["keys"] == [item["keys"] for item in items] and batch["outputs"] == {}
            members = [images.shards[s].samples[i]["outputs"]["embedding"] for _, s, i in chosen]
            stored = batch["stored"]["data"]["embedding"]
            assert stored.dtype == torch.uint8 and len(stored) == sum(m["size"] - HEADER for m in members)
            whole = images.decode(batch)
            expected = torch.stack([item["outputs"]["sam.embedding"] for item in items])
            for row, (_, shard, index) in zip(expected, chosen, strict=True):
                assert np.array_equal(row, images.shards[shard].read(index)["embedding"])
            found = whole["outputs"]["sam.embedding"]
            assert found.dtype == torch.float32 and torch.equal(found, expected) and float(found.std()) > 0.1
            assert torch.equal(whole["pixels"], torch.stack([item["pixels"] for item in items]))
            assert "stored" in batch and "stored" not in whole


def test_a_flipped_byte_stops_the_loader_at_the_member_s_first_read_in_a_process(tmp_path):
    recipe = tiny.load(tmp_path, "cache.codec=int8")
    cache.run(recipe)
    path = tmp_path / "cache/train-001.tar"
    data = CachedImages(cache.open_cache(recipe), "train")
    reader = data.shards[1]
    member = reader.samples[2]["outputs"]["embedding"]
    places = [[(0, 0, 0), (0, 1, 1)], [(0, 0, 1), (0, 1, 2)]]
    damaged = bytearray(path.read_bytes())
    damaged[member["offset"] + member["size"] - 5] ^= 4
    path.write_bytes(damaged)
    for workers in (0, 1):
        with pytest.raises(UserError, match=rf"train-001\.tar: the embedding of '{reader.keys[2]}' is damaged"):
            list(batches(data, places, workers))
    damaged[member["offset"] + member["size"] - 5] ^= 4
    path.write_bytes(damaged)
    assert len(list(batches(data, places, 0))) == 2
    damaged[member["offset"] + member["size"] - 5] ^= 4
    path.write_bytes(damaged)
    assert len(list(batches(data, places, 0))) == 2  # it was checked


def test_a_student_learns_the_same_from_a_trimmed_cache_as_from_a_full_one_without_its_padding(tmp_path):
    rows = {}
    for trim in ("true", "false"):
        (tmp_path / trim).mkdir()
        recipe = tiny.load(tmp_path / trim, f"cache.trim={trim}", *EXCLUDE)
        cache.run(recipe)
        run = distill.run(recipe)
        rows[trim] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for row in rows[trim]:
            row.pop("images_per_second", None)
    assert rows["true"] == rows["false"] and rows["true"][-2]["loss"] < rows["true"][0]["loss"]
    include = tiny.load(tmp_path / "true", f"out={tmp_path}/include")
    with pytest.raises(UserError, match="another one: outputs.embedding.codec.train"):
        cache.run(include)
    trimmed = dataclasses.replace(include, cache=recipes.CacheSettings(str(tmp_path / "true/cache"), trim=True))
    with pytest.raises(UserError, match=r"objective\.embedding\.padding=include: a cache with cache\.trim=true"):
        distill.run(trimmed)


HEADER = 128  # of each of these .npy
EXCLUDE = ("objective.embedding.padding=exclude",)
