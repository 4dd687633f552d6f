"""Images joined to their outputs: what a loading process keeps in memory."""

import tiny
import torch

from fmdistill import cache
from fmdistill.cache.dataset import CachedImages


def counted(data, monkeypatch):
    source, fetched = type(data.cache.images.source), []
    fetch = source.fetch

    def count(self, shard, key):
        fetched.append(key)
        return fetch(self, shard, key)

    monkeypatch.setattr(source, "fetch", count)
    return fetched


def test_images_are_prepared_once_as_far_as_the_memory_goes(tmp_path, monkeypatch):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    opened = cache.open_cache(recipe)
    one = CachedImages(opened, "train").item(0, 0, 0)["pixels"].nbytes
    data = CachedImages(opened, "train", memory=2.5 * one / 1e9)
    fetched = counted(data, monkeypatch)
    first = [data.item(0, 0, index) for index in range(4)]
    assert len(fetched) == 4
    again = [data.item(1, 0, index) for index in range(4)]
    assert fetched[4:] == fetched[2:4]  # the first two fit
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["pixels"], b["pixels"]) and torch.equal(a["sizes"], b["sizes"]) and a["keys"] == b["keys"]


def test_without_memory_every_epoch_reads_the_images_anew(tmp_path, monkeypatch):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    data = CachedImages(cache.open_cache(recipe), "train")
    fetched = counted(data, monkeypatch)
    for _ in range(3):
        data.item(0, 0, 1)
    assert len(fetched) == 3
