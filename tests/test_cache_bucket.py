"""A cache behind a URL: sent and fetched without a lock, in a bounded folder that no other cache shares."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import tiny

from fmdistill import cache, distill
from fmdistill.cache import sidecar
from fmdistill.cache.bucket import SENT, Bucket, Remote
from fmdistill.cache.store import opened
from fmdistill.cache.verification import verify_files
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError


def far(folder: Path, machine: str, **changes) -> Recipe:
    """Return the toy recipe with its cache in folder/bucket, behind a URL, seen from a machine of its own."""
    recipe = tiny.load(folder)
    assert recipe.cache is not None
    there = {"root": f"file://{folder}/bucket", "local": str(folder / machine), **changes}
    settings = replace(recipe.cache, **there)
    return replace(recipe, cache=settings, out=str(folder / machine / "run"))


def values(recipe: Recipe) -> dict[str, bytes]:
    whole = cache.open_cache(recipe)
    readers = [reader for split in whole.shards.values() for reader in split]
    return {key: r.read(i)["embedding"].tobytes() for r in readers for i, key in enumerate(r.keys)}


def test_what_one_machine_caches_another_reads_and_trains_on(tmp_path):
    near = tiny.load(tmp_path)
    cache.run(near)
    here, there = far(tmp_path, "one"), far(tmp_path, "two")
    cache.run(here)
    names = {path.name for path in (tmp_path / "bucket").iterdir()}
    assert {"manifest.json", "head.json", "head.safetensors", "recipe.yaml"} < names
    assert len(names) == 4 + 2 * 4 and all(SENT.fullmatch(name) for name in names if "-0" in name)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "bucket").iterdir()}
    cache.run(there)  # finds all of it
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "bucket").iterdir()} == before
    assert values(there) == values(here) == values(near)
    assert verify_files(cache.open_cache(there)) == 4
    assert (distill.run(there) / "student.safetensors").read_bytes() == (
        distill.run(near) / "student.safetensors"
    ).read_bytes()


def test_the_folder_stays_bounded_and_what_left_it_is_fetched_again(tmp_path):
    cache.run(far(tmp_path, "one"))
    tar = max(path.stat().st_size for path in (tmp_path / "bucket").glob("*.tar"))
    small = far(tmp_path, "two", local_gb=1.5 * tar / 1e9)
    everything = values(far(tmp_path, "one"))
    for _ in range(2):
        assert values(small) == everything
        assert len(list((tmp_path / "two").glob("*/*.tar"))) == 1


def test_a_small_disk_here_does_not_refuse_a_large_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr("fmdistill.cache.store.shutil.disk_usage", lambda path: pytest.fail("asked"))
    cache.run(far(tmp_path, "one"))
    assert len(list((tmp_path / "bucket").glob("*.tar"))) == 4


def test_a_process_that_starts_beside_another_does_not_forget_its_claim(tmp_path, monkeypatch):
    recipe, share, beside = far(tmp_path, "one"), Bucket.share, []

    def slow(self: Bucket) -> None:
        beside.append(Thread(target=opened, args=(recipe.cache,)))
        beside[-1].start()
        time.sleep(0.5)
        assert (self.folder / "manifest.json").exists()
        share(self)

    monkeypatch.setattr(Bucket, "share", slow)
    cache.run(recipe)
    for thread in beside:
        thread.join()
    assert (tmp_path / "bucket/manifest.json").exists() and len(beside) == 1


def test_two_urls_never_share_a_folder(tmp_path):
    first = far(tmp_path, "one")
    assert first.cache is not None
    roots = {name: f"file://{tmp_path}/{name}" for name in ("a/b", "a-b", "a", "a//b")}
    folders = {opened(replace(first.cache, root=root)).folder for root in roots.values()}
    assert len(folders) == 4
    assert opened(replace(first.cache, root=f"file://{tmp_path}/a/")).folder in folders  # the same cache


def test_a_shard_that_was_not_sent_is_sent_by_the_next_process(tmp_path, monkeypatch):
    recipe = far(tmp_path, "one")
    with monkeypatch.context() as broken:
        broken.setattr("fmdistill.cache.bucket.Remote.put", _failing_at(".tar"))
        with pytest.raises(UserError, match="out of reach"):
            cache.run(recipe)
    assert recipe.cache is not None
    assert not list((tmp_path / "bucket").glob("*.tar"))
    unsent = list((tmp_path / "one").glob("*/train-*.tar"))
    assert len(unsent) == 1 and not SENT.fullmatch(unsent[0].name)
    opened(recipe.cache)
    assert len(list((tmp_path / "bucket").glob("*.tar"))) == 1
    cache.run(recipe)
    assert len(list((tmp_path / "bucket").glob("*.tar"))) == 4


def _failing_at(suffix: str):
    put = Remote.put

    def failing(self: Remote, path: Path, name: str) -> None:
        if name.endswith(suffix):
            raise UserError("out of reach")
        put(self, path, name)

    return failing


def test_of_two_machines_that_wrote_one_shard_every_reader_takes_the_same(tmp_path):
    recipe = far(tmp_path, "one")
    cache.run(recipe)
    shard = next((tmp_path / "bucket").glob("train-000-*.json"))
    fields = sidecar.read(shard)
    assert fields is not None
    other = shard.with_name("train-000-" + "0" * 16 + ".json")  # as if a machine of other arithmetic wrote it
    other.write_text(sidecar.write(fields))
    os.link(shard.with_suffix(".tar"), other.with_suffix(".tar"))
    for machine in ("two", "three"):
        opened = cache.open_cache(far(tmp_path, machine))
        assert opened.shards["train"][0].path.stem == other.stem


def test_another_cache_at_the_same_url_starts_anew_and_another_teacher_is_refused(tmp_path):
    recipe = far(tmp_path, "one")
    cache.run(recipe)
    with pytest.raises(UserError, match="another one"):
        cache.run(replace(recipe, cache=replace(recipe.cache, codec="fp32", local=str(tmp_path / "two"))))
    for path in (tmp_path / "bucket").iterdir():
        path.unlink()
    cache.run(replace(recipe, cache=replace(recipe.cache, codec="fp32", local=str(tmp_path / "two"))))
    assert recipe.cache is not None
    folder = opened(recipe.cache).folder
    assert json.loads((folder / "manifest.json").read_text())["outputs"]["embedding"]["codec"]["train"] == "fp32"


def test_what_cannot_be_reached_or_is_damaged_is_one_line(tmp_path):
    recipe = far(tmp_path, "one")
    assert recipe.cache is not None
    with pytest.raises(UserError, match="only for a URL"):
        opened(replace(recipe.cache, root=str(tmp_path)))
    with pytest.raises(UserError, match="cache.root=nowhere://x"):
        opened(replace(recipe.cache, root="nowhere://x"))
    cache.run(recipe)
    tar = next((tmp_path / "bucket").glob("train-000-*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"{tar.name}: differs from its sidecar"):
        values(far(tmp_path, "two"))
    other = next((tmp_path / "bucket").glob("train-001-*.tar"))
    other.write_bytes(b"x" + other.read_bytes()[1:])
    each = [f"file://{tmp_path}/bucket/{one.name}: differs from its sidecar \\(sha256\\)" for one in (tar, other)]
    with pytest.raises(UserError, match=f"^{each[0]}; {each[1]}; delete these files and run `fmdistill cache` again$"):
        verify_files(cache.open_cache(far(tmp_path, "three")))
    copy = next((tmp_path / "one").glob("*/train-002-*.tar"))
    copy.write_bytes(b"x" + copy.read_bytes()[1:])
    with pytest.raises(
        UserError, match=f"^{copy}: .*\\(a copy of file://{tmp_path}/bucket/{copy.name}\\); delete it and"
    ):
        verify_files(cache.open_cache(recipe))


def test_a_tar_that_is_deleted_there_as_the_error_says_is_cached_anew(tmp_path):
    one, two = far(tmp_path, "one"), far(tmp_path, "two")
    cache.run(one)
    everything = values(one)
    tar = next((tmp_path / "bucket").glob("train-000-*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"bucket/{tar.name}: differs .* delete it there and run `fmdistill cache`"):
        values(two)
    tar.unlink()
    with pytest.raises(UserError, match="not cached yet.*'train-000' first"):
        values(two)
    cache.run(two)
    assert tar.exists() and values(two) == values(far(tmp_path, "three")) == values(one) == everything


def test_a_bucket_that_does_not_answer_costs_nothing_here(tmp_path, monkeypatch):
    recipe = far(tmp_path, "one")
    assert recipe.cache is not None
    with monkeypatch.context() as broken:
        broken.setattr("fmdistill.cache.bucket.Remote.put", _failing_at(".tar"))
        with pytest.raises(UserError, match="out of reach"):
            cache.run(recipe)

    def here() -> set[str]:
        return {path.name for path in (tmp_path / "one").glob("*/*")}

    before = here()
    assert {"train-000.tar", "train-000.json", "manifest.json"} < before
    with monkeypatch.context() as broken:
        broken.setattr("fsspec.implementations.local.LocalFileSystem.ls", silent)
        with pytest.raises(UserError, match=r"bucket/: TimeoutError: no answer; is the URL right"):
            cache.run(recipe)
    os.rename(tmp_path / "bucket", tmp_path / "away")  # as a mount that is gone
    with pytest.raises(UserError, match=r"manifest.json is gone, and .* holds shards of that cache; is the URL right"):
        opened(recipe.cache)
    os.rename(tmp_path / "away", tmp_path / "bucket")
    assert here() == before
    cache.run(recipe)
    assert len(list((tmp_path / "bucket").glob("*.tar"))) == 4


def silent(*_, **__):
    raise TimeoutError("no answer")


def test_a_url_may_hold_any_characters(tmp_path):
    recipe = far(tmp_path, "one")
    assert recipe.cache is not None
    odd = replace(recipe, cache=replace(recipe.cache, root=f"file://{tmp_path}/a[1] *?/b"))
    cache.run(odd)
    assert len(list((tmp_path / "a[1] *?/b").iterdir())) == 12 and len(values(odd)) == 32


def test_the_longest_unused_goes_first_and_a_dead_download_is_removed(tmp_path):
    cache.run(far(tmp_path, "one"))
    tar = max(path.stat().st_size for path in (tmp_path / "bucket").glob("train*.tar"))
    small = far(tmp_path, "two", local_gb=2.5 * tar / 1e9)
    shards = cache.open_cache(small).shards["train"]
    folder = next((tmp_path / "two").iterdir())
    dead = folder / f".{shards[0].path.name}.elsewhere.1.{'0' * 8}.tmp"
    dead.write_bytes(b"x")
    os.utime(dead, (0, 0))
    for number in (0, 1, 0, 2):
        shards[number].read(0)
        time.sleep(0.02)
    assert {path.name[:9] for path in folder.glob("*.tar")} == {"train-000", "train-002"}
    cache.open_cache(small)
    assert not dead.exists()


def test_a_tar_that_another_process_evicts_before_it_is_opened_is_fetched_again(tmp_path, monkeypatch):
    cache.run(far(tmp_path, "one"))
    reader = cache.open_cache(far(tmp_path, "two")).shards["train"][0]
    fetch, times = Bucket.fetch, []

    def evicted(self: Bucket, name: str, sha256: str) -> Path:
        path = fetch(self, name, sha256)
        times.append(name)
        if len(times) < 3:
            path.unlink()
        return path

    monkeypatch.setattr(Bucket, "fetch", evicted)
    assert reader.read(0)["embedding"].std() > 0.1 and len(times) == 3
