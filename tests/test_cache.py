"""The cache: whole or absent, only what is missing, nothing silently wrong."""

import json
import os
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import webdataset
from segment_anything import SamPredictor

from fmdistill import cache, files
from fmdistill.cache import manifest
from fmdistill.cache.dataset import CachedImages
from fmdistill.export import half
from fmdistill.images import build, decode
from fmdistill.images.source import Encoded, unescape
from fmdistill.mini.photos import Photos
from fmdistill.mini.sam import sam_mini_student
from fmdistill.registry import UserError


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def sidecar(folder, shard: str = "train-000") -> dict:
    return json.loads((folder / f"cache/{shard}.json").read_text())


def test_a_cache_holds_what_the_teacher_says_as_sam_predictor_sees_the_image(tmp_path):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    opened = cache.open_cache(recipe)
    predictor = SamPredictor(tiny.teacher().sam)
    for split, step in (("train", 2.0**-11), ("validation", 0.0)):
        data = CachedImages(opened, split)
        for shard, count in enumerate(data.counts):
            for index in range(0, count, 3):
                item = tiny.item(data, shard, index)
                predictor.set_image(np.asarray(decode(data.encoded(shard, index).data)))
                expected = predictor.features[0]
                error = (item["outputs"]["sam.embedding"] - expected).abs().max()
                assert error <= expected.abs().max() * (step + 1e-5)
                assert tuple(item["sizes"].tolist()) == tuple(predictor.input_size)


def test_webdataset_reads_the_shards(tmp_path):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    opened = cache.open_cache(recipe)
    reader = opened.shards["train"][0]
    samples = list(webdataset.WebDataset(str(reader.path), shardshuffle=False).decode())
    assert [unescape(sample["__key__"]) for sample in samples] == reader.keys
    for index, sample in enumerate(samples):
        assert np.array_equal(sample["embedding.npy"].astype(np.float32), reader.read(index)["embedding"])


def test_running_again_changes_nothing_and_a_lost_shard_comes_back_the_same(tmp_path):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    before = contents(tmp_path / "cache")
    cache.run(recipe)
    assert contents(tmp_path / "cache") == before
    (tmp_path / "cache/train-001.tar").unlink()
    (tmp_path / "cache/train-000.json").write_text("{")
    (tmp_path / "cache/train-002.tar").write_bytes(before["train-002.tar"][:-512])
    cache.run(recipe)
    assert contents(tmp_path / "cache") == before


def test_a_limit_cuts_the_last_shard_and_lifting_it_completes_the_cache(tmp_path):
    cache.run(tiny.load(tmp_path, "images.limit=11"))
    cut = cache.open_cache(tiny.load(tmp_path, "images.limit=11"))
    assert [len(r.samples) for r in cut.shards["train"]] == [8, 3]
    with pytest.raises(UserError, match="not cached yet"):
        cache.open_cache(tiny.load(tmp_path)).shards  # noqa: B018
    cache.run(tiny.load(tmp_path))
    assert [len(r.samples) for r in cache.open_cache(tiny.load(tmp_path)).shards["train"]] == [8, 8, 8]
    assert [len(r.samples) for r in cache.open_cache(tiny.load(tmp_path, "images.limit=11")).shards["train"]] == [8, 3]


def test_another_identity_in_the_same_folder_is_refused_naming_both(tmp_path):
    cache.run(tiny.load(tmp_path))
    before = contents(tmp_path / "cache")
    with pytest.raises(UserError, match=r"teacher\.weights is '.*' there and '.*' here.*cache\.root"):
        cache.run(tiny.load(tmp_path, "teacher.seed=1"))
    with pytest.raises(UserError, match="codec.train is 'fp16' there and 'fp32' here"):
        cache.run(tiny.load(tmp_path, "cache.codec=fp32"))
    assert contents(tmp_path / "cache") == before


def test_statistics_count_valid_and_padded_tokens_apart(tmp_path):
    recipe = tiny.load(tmp_path, "cache.codec=fp32")
    cache.run(recipe)
    reader = cache.open_cache(recipe).shards["train"][0]
    sidecar = json.loads(reader.path.with_suffix(".json").read_text())
    maps = np.stack([reader.read(i)["embedding"] for i in range(len(reader.samples))])
    valid = np.zeros((len(maps), 4, 4), bool)
    for row, sample in zip(valid, reader.samples, strict=True):
        h, w = sample["resized"]
        row[: -(-h // 16), : -(-w // 16)] = True
    kinds = sidecar["statistics"]["embedding"]
    for kind, mask in (("valid", valid), ("padded", ~valid)):
        tokens = maps.transpose(0, 2, 3, 1)[mask].astype(np.float64)
        assert kinds[kind]["count"] == len(tokens) > 0
        np.testing.assert_allclose(kinds[kind]["sum"], tokens.sum(0), rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(kinds[kind]["square"], (tokens**2).sum(0), rtol=1e-5)
        np.testing.assert_allclose(kinds[kind]["largest"], np.abs(tokens).max(0), rtol=1e-6)


def test_neither_sidecar_nor_tar_holds_a_clock_or_a_host(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        cache.run(tiny.load(tmp_path / name))
    first, second = (contents(tmp_path / name / "cache") for name in ("a", "b"))
    del first["recipe.yaml"], second["recipe.yaml"]  # it holds the folder's own name
    assert first == second
    with tarfile.open(tmp_path / "a/cache/train-000.tar") as archive:
        assert {member.mtime for member in archive} == {0}


class Broken(Photos):
    """Photos of which the key given is no image."""

    bad = ("astronaut-0000",)

    def read(self, shard):
        for image in super().read(shard):
            yield Encoded(image.key, image.data[:200]) if image.key in self.bad else image


def test_a_broken_image_is_counted_named_and_skipped(tmp_path, caplog):
    recipe = tiny.load(tmp_path, "images.name=test_cache:Broken", *PHOTOS, "cache.max_failed=0.05")
    with caplog.at_level("WARNING"):
        cache.run(recipe)
    assert "'astronaut-0000' skipped: cannot be decoded" in caplog.text
    opened = cache.open_cache(recipe)
    assert sum(len(r.samples) for r in opened.shards["train"]) == 23
    assert "astronaut-0000" not in opened.shards["train"][0].keys
    (failed,) = sidecar(tmp_path)["failed"]
    assert failed["key"] == "astronaut-0000" and "cannot be decoded" in failed["problem"]


def test_too_many_broken_images_stop_the_run_and_leave_no_partial_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(Broken, "bad", ("astronaut-0000", "china-0000", "brick-0000"))
    says = r"of .* images gave no output, more than cache\.max_failed=0\.05; .*such as cache\.max_failed=0\.[1-9]\d*$"
    with pytest.raises(UserError, match=says):
        cache.run(tiny.load(tmp_path, "images.name=test_cache:Broken", *PHOTOS, "cache.max_failed=0.05"))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix in (".tar", ".tmp")]


PHOTOS = ("images.train=24", "images.validation=8", "images.size=64", "images.shard_size=8")


def poisoned(share: float) -> tiny.SamTeacher:
    """A teacher some of whose outputs are not finite."""
    made = tiny.teacher()
    real = type(made).__call__

    class Poisoned(type(made)):
        calls = 0

        def __call__(self, pixels, sizes):
            out = real(self, pixels, sizes)["embedding"].clone()
            type(self).calls += 1
            if share == 1 or type(self).calls == 2:
                out[: max(1, int(share * len(out)))] = torch.nan
            return {"embedding": out}

    made.__class__ = Poisoned
    return made


def one_bad() -> tiny.SamTeacher:
    return poisoned(0.25)


def all_bad() -> tiny.SamTeacher:
    return poisoned(1)


def test_a_non_finite_output_is_set_aside_and_a_wholly_bad_first_batch_stops(tmp_path):
    recipe = tiny.load(tmp_path, "teacher.name=test_cache:one_bad", "cache.max_failed=0.2")
    cache.run(recipe)
    (failed,) = sidecar(tmp_path)["failed"]
    assert "non-finite" in failed["problem"]
    with pytest.raises(UserError, match="every output of the first batch is non-finite"):
        cache.run(tiny.load(tmp_path, "teacher.name=test_cache:all_bad", f"cache.root={tmp_path}/other"))


def test_verify_names_every_damaged_shard_at_once(tmp_path, monkeypatch):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    for name in ("train-000", "train-002", "validation-000"):
        path = tmp_path / f"cache/{name}.tar"
        damaged = bytearray(path.read_bytes())
        damaged[1200 if name == "train-002" else 10] ^= 1
        path.write_bytes(damaged)
    first, second, third = (
        r"train-000\.tar: bytes outside its members are damaged \(checksum\)",
        r"train-002\.tar: the embedding of '[^']*' is damaged \(checksum\)",
        r"validation-000\.tar: bytes outside",
    )
    again = r"; delete these files and run `fmdistill cache` again$"
    with pytest.raises(UserError, match=f"{first}; .*{second}; .*{third}.*{again}") as error:
        cache.verify(recipe)
    assert "train-001" not in str(error.value)
    monkeypatch.setattr(
        sys.modules["fmdistill.cache.verification"], "NAMED", 1
    )  # its package has a function of its name
    with pytest.raises(UserError, match=f"{first}; and 2 more{again}"):
        cache.verify(recipe)


def test_a_flipped_byte_is_found_at_the_first_read_and_by_verify(tmp_path):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    path = tmp_path / "cache/train-001.tar"
    reader = cache.open_cache(recipe).shards["train"][1]
    offset = reader.samples[2]["outputs"]["embedding"]["offset"]
    damaged = bytearray(path.read_bytes())
    damaged[offset + 300] ^= 4
    path.write_bytes(damaged)
    assert reader.read(1)["embedding"].shape == (32, 4, 4)
    with pytest.raises(UserError, match=rf"train-001\.tar: the embedding of '{reader.keys[2]}' is damaged"):
        reader.read(2)
    with pytest.raises(UserError, match=rf"train-001\.tar: the embedding of '{reader.keys[2]}' is damaged"):
        cache.verify(recipe)
    damaged[offset + 300] ^= 4
    damaged[10] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"train-001\.tar: bytes outside its members"):
        cache.verify(recipe)


def test_verify_recomputes_a_sample_and_notices_other_values(tmp_path):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    found = cache.verify(recipe, samples=10)
    assert found["samples"] == 10 and found["shards"] == 4
    assert 0 < found["mean_error"] < found["largest_error"] < 0.01 and found["mean_cosine"] > 0.99999
    with pytest.raises(UserError, match="this cache is another one"):
        cache.verify(tiny.load(tmp_path, "teacher.seed=5"))


def test_a_changed_image_is_noticed_when_it_is_used(tmp_path, monkeypatch):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    data = CachedImages(cache.open_cache(recipe), "train")
    source = data.cache.images.source
    other = source.fetch("train-000", data.shards[0].keys[1])
    monkeypatch.setattr(Photos, "fetch", lambda self, shard, key: Encoded(key, other.data))
    with pytest.raises(UserError, match="is not the one that the teacher saw"):
        tiny.item(data, 0, 0)


def test_the_hours_left_are_told_once_after_the_first_batches(tmp_path, caplog, monkeypatch):
    # the first batch, which warms up, ends after 5 hours; each later one takes 15 minutes
    ticks = iter([18000.0 + 900 * i for i in range(100)])
    monkeypatch.setattr("fmdistill.cache.teacher_pass.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    with caplog.at_level("INFO"):
        cache.run(tiny.load(tmp_path))
    told = [message for message in caplog.messages if "images/s" in message]
    assert told == ["0.00444 images/s; about 1:00 hours for the 16 images left"]
    caplog.clear()
    with caplog.at_level("INFO"):
        cache.run(tiny.load(tmp_path))  # nothing is missing
    assert "images/s" not in caplog.text


def test_too_little_space_stops_before_the_first_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 20_000})())
    with pytest.raises(UserError, match=r"needs .* GB but only .* are free.*images\.limit="):
        cache.run(tiny.load(tmp_path))
    assert not list((tmp_path / "cache").glob("*.tar"))


@pytest.mark.parametrize("split, now", [("train", "validation"), ("validation", "train")])
def test_a_shard_that_changes_its_split_is_cached_anew_in_that_split_s_codec(tmp_path, monkeypatch, split, now):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    before = contents(tmp_path / "cache")
    real = Photos.shards
    moved = real(build(recipe.images).source)[split][0]

    def shards(self):
        listed = real(self)
        return {s: [n for n in names if n != moved] + [moved] * (s == now) for s, names in listed.items()}

    monkeypatch.setattr(Photos, "shards", shards)
    assert sidecar(tmp_path, moved)["codecs"]["embedding"] == {"train": "fp16", "validation": "fp32"}[split]
    with pytest.raises(UserError, match=f"1 shards are not cached yet, .*'{moved}' first"):
        cache.open_cache(recipe).shards  # noqa: B018
    cache.run(recipe)
    assert sidecar(tmp_path, moved)["codecs"]["embedding"] == {"train": "fp16", "validation": "fp32"}[now]
    assert moved in [reader.name for reader in cache.open_cache(recipe).shards[now]]
    assert cache.verify(recipe, samples=64)["samples"] == 32
    monkeypatch.undo()
    cache.run(recipe)
    assert contents(tmp_path / "cache") == before


@pytest.mark.parametrize("how", ["no json", "no weights", "truncated", "another teacher's"])
def test_a_lost_or_wrong_head_is_noticed_by_verify_and_healed_by_the_next_run(tmp_path, how):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    before = contents(tmp_path / "cache")
    if how == "no json":
        (tmp_path / "cache/head.json").unlink()
    elif how == "no weights":
        (tmp_path / "cache/head.safetensors").unlink()
    elif how == "truncated":
        (tmp_path / "cache/head.safetensors").write_bytes(before["head.safetensors"][:2000])
    else:
        tiny.teacher(seed=1).head().save(tmp_path / "cache")
    if how != "another teacher's":
        with pytest.raises(UserError, match=r"prompt head.*`fmdistill cache RECIPE` writes it anew"):
            cache.open_cache(recipe).head()
    with pytest.raises(UserError, match=r"head\.json and head\.safetensors are missing, damaged or not the teacher's"):
        cache.verify(recipe)
    cache.run(recipe)
    assert contents(tmp_path / "cache") == before


def test_a_finished_cache_needs_the_teacher_s_file_no_more(tmp_path, monkeypatch, caplog):
    weights = tmp_path / "teacher.safetensors"
    half.export(sam_mini_student(), weights)
    mini = ("teacher.name=sam_mini", f"teacher.weights={weights}", *PHOTOS[:2], "images.size=64")
    recipe = tiny.load(tmp_path, *mini)
    made = cache.run(recipe)
    before = contents(tmp_path / "cache")
    weights.rename(tmp_path / "away")
    with caplog.at_level("INFO"):
        assert cache.run(recipe) == made
    assert "the teacher's file is gone, and not needed" in caplog.text
    assert contents(tmp_path / "cache") == before
    for other, says in (
        ("cache.codec=fp32", "outputs.embedding.codec.train is 'fp16' there"),
        ("cache.similarity=true", "outputs.embedding_similarity is None there"),
        ("teacher.dtype=bf16", "teacher.dtype is 'fp32' there"),
        ("teacher.name=sam_vit_b", "teacher.name is 'sam_mini' there"),
        ("images.size=48", "this cache is another one: images"),
    ):
        with pytest.raises(UserError, match=says):
            cache.run(tiny.load(tmp_path, *mini, other))
    for lost in ("head.json", "train-001.json"):  # there is work for the teacher
        (tmp_path / "cache" / lost).rename(tmp_path / lost)
        with pytest.raises(UserError, match="no such file"):
            cache.run(recipe)
        (tmp_path / lost).rename(tmp_path / "cache" / lost)
    half.export(sam_mini_student(), weights)  # a file of other weights is there: it is looked at
    with pytest.raises(UserError, match=r"teacher\.weights is '.*' there"):
        cache.run(recipe)


def test_images_that_are_added_to_or_taken_from_a_folder_are_cached_anew(tmp_path):
    photos, data = build({"name": "photos", "train": 20, "validation": 4, "size": 64}), tmp_path / "data"
    data.mkdir()
    every = [image for shard in photos.shards() for image in photos.read(shard)]
    for image in every[:12]:
        (data / f"{image.key}.jpg").write_bytes(image.data)
    recipe = tiny.load(tmp_path, "images.name=folder", f"images.root={data}", "images.validation=0.3")

    def cached() -> set[str]:
        return {key for split in cache.open_cache(recipe).shards.values() for reader in split for key in reader.keys}

    cache.run(recipe)
    assert cached() == {f"{image.key}.jpg" for image in every[:12]}
    for image in every[12:20]:
        (data / f"{image.key}.jpg").write_bytes(image.data)
    (data / f"{every[0].key}.jpg").unlink()
    with pytest.raises(UserError, match="2 shards are not cached yet, or hold other images by now"):
        cached()
    cache.run(recipe)
    assert cached() == {f"{image.key}.jpg" for image in every[1:20]}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*-*")}
    cache.run(recipe)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*-*")} == before


def test_what_a_dead_process_left_goes_with_the_next_run_also_where_nothing_is_missing(tmp_path):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    dead = subprocess.Popen(["true"])
    dead.wait()
    own = files.temporary_name(tmp_path / "cache/train-000.tar")
    left = own.with_name(own.name.replace(f".{os.getpid()}.", f".{dead.pid}."))
    own.write_bytes(b"a living one's")
    left.write_bytes(b"x")
    cache.run(recipe)
    assert own.exists() and not left.exists()


@pytest.mark.parametrize(("text", "kind"), [("[1, 2]", "list"), ('"x"', "str"), ("3", "int"), ("null", "NoneType")])
def test_a_manifest_that_is_json_but_no_object_is_one_line(tmp_path, text, kind):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=rf"manifest.json: not a manifest \(a {kind}\); delete the file"):
        manifest.read(tmp_path)
