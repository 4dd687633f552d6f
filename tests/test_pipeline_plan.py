"""The plan's figures are those of the job that follows, and measuring leaves nothing behind."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import toy_digits
from PIL import Image

from fmdistill import cache, recipe
from fmdistill.cache import footprint
from fmdistill.cache.codec import CODECS
from fmdistill.cli import main
from fmdistill.images import Images, Shard
from fmdistill.pipeline import plan
from fmdistill.pipeline.rehearsal import Repeated, verb_settings
from fmdistill.registry import UserError

QUICK = plan.Settings(images=6, steps=1)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, which each test leaves empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not list(folder.iterdir())


def sizes(root: Path, suffix: str) -> int:
    return sum(path.stat().st_size for path in root.glob(f"*{suffix}"))


def captioned(folder, *overrides):
    small = ["images.train=70", "images.validation=20", "train.batch_size=8", "train.steps=9", "train.workers=0"]
    kept = [f"cache.root={folder}/cache", f"out={folder}/run", "teacher.weights=none", "teacher.batch=8"]
    return recipe.load("recipes/demo/clip_mse.yaml", [*small, *kept, *overrides])


def digits(folder):
    toy_digits.trained(folder)
    return recipe.load(folder / "student.yaml", ["train.workers=0"])


@pytest.mark.parametrize("made", [tiny.load, captioned, digits])
def test_bytes_are_those_that_the_cache_then_takes(made, tmp_path):
    settings = made(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = plan.run(settings, QUICK)
    assert sorted(tmp_path.rglob("*")) == before and found.disk
    cache.run(settings)
    root = Path(settings.cache.root)
    heads = sum(p.stat().st_size for p in root.iterdir() if p.name.startswith(("manifest", "head")))
    sidecars = sizes(root, ".json") - sum(p.stat().st_size for p in (root / "manifest.json", root / "head.json"))
    assert found.disk.tars[found.disk.codec] == sizes(root, ".tar")
    assert found.disk.sidecars == pytest.approx(sidecars, rel=0.1)
    assert found.disk.beside == heads
    assert found.disk.missing == pytest.approx(sizes(root, ".tar") + sidecars, rel=0.1)
    opened = cache.open_cache(settings)
    assert found.images == {split: sum(len(s.keys) for s in shards) for split, shards in opened.shards.items()}
    assert found.shards == {split: len(shards) for split, shards in opened.shards.items()} and found.counted


def test_every_codec_is_foretold_and_what_is_there_is_not_counted_again(tmp_path):
    found = plan.run(tiny.load(tmp_path), QUICK)
    assert found.disk and found.disk.tars.keys() == {*CODECS, "fp16-trimmed"} and found.missing_images == 32
    for codec in CODECS:
        settings = tiny.load(tmp_path, f"cache.codec={codec}", f"cache.root={tmp_path}/{codec}")
        cache.run(settings)
        assert sizes(tmp_path / codec, ".tar") == found.disk.tars[codec]
    with pytest.raises(UserError, match="this cache is another one"):
        plan.run(tiny.load(tmp_path, f"cache.root={tmp_path}/fp16", "cache.codec=fp32"), QUICK)
    first = cache.open_cache(settings).shards["train"][0].path
    first.with_suffix(".json").unlink()  # to be made anew
    before = sorted(tmp_path.rglob("*"))
    again = plan.run(settings, QUICK)
    assert again.disk and again.disk.missing_shards == 1 and again.missing_images == 8
    assert first.stat().st_size < again.disk.missing < 3 * first.stat().st_size  # and a sidecar
    assert sorted(tmp_path.rglob("*")) == before


def test_what_trimming_takes_is_foretold_by_settings_that_can_be_given(tmp_path):
    every = plan.Settings(images=24, steps=1)
    found = plan.run(tiny.load(tmp_path), every)
    trimmed = ["objective.embedding.padding=exclude", "cache.codec=fp16", "cache.trim=true"]
    own = plan.run(tiny.load(tmp_path, *trimmed), every)
    assert found.disk and own.disk and own.disk.codec == "fp16-trimmed"
    assert found.disk.tars == pytest.approx(own.disk.tars, rel=0.01) and own.disk.tars.keys() == found.disk.tars.keys()
    cache.run(tiny.load(tmp_path, *trimmed))
    assert sizes(tmp_path / "cache", ".tar") == own.disk.tars["fp16-trimmed"] < own.disk.tars["fp16"]
    shown = plan.text(found, "tiny.yaml"), plan.text(own, "tiny.yaml")
    assert "with cache.codec=fp16 in" in shown[0] and "with cache.codec=fp16 cache.trim=true in" in shown[1]
    assert all("fp16 with cache.trim=true" in one and "-trimmed" not in one for one in shown)


def test_what_a_killed_process_loses_is_told(tmp_path):
    found = plan.run(tiny.load(tmp_path, "images.shard_size=10"), QUICK)
    assert found.disk and [(split, images) for split, images, _ in found.disk.held] == [
        ("train", 10),
        ("train", 10),
        ("validation", 8),
        ("train", 4),
    ]
    (line,) = [line for line in plan.text(found, "tiny.yaml").splitlines() if line.startswith("a shard ")]
    assert re.search(r"up to 10 images, [\d.]+ kB, ", line) and line.endswith(
        " s of the teacher: the most that a killed process loses"
    )
    cache.run(tiny.load(tmp_path, "images.shard_size=10"))
    again = plan.run(tiny.load(tmp_path, "images.shard_size=10"), QUICK)
    assert "a shard " not in plan.text(again, "tiny.yaml")  # nothing is left to lose


def test_a_window_that_does_not_fit_in_what_is_kept_of_a_bucket_is_said(tmp_path):
    settings = tiny.load(tmp_path)
    assert settings.cache
    far = replace(settings.cache, root=f"file://{tmp_path}/bucket", local=str(tmp_path / "here"))
    found = plan.run(replace(settings, cache=far), QUICK)
    assert found.disk
    shown = plan.text(found, "tiny.yaml")
    assert f"in file://{tmp_path}/bucket, copies in {tmp_path}/here" in shown and "TOO LITTLE" not in shown
    train = [size for split, _, size in found.disk.held if split == "train"]
    small = replace(found, recipe=replace(settings, cache=replace(far, local_gb=1.5 * train[0] / 1e9)))
    (line,) = [line for line in plan.text(small, "tiny.yaml").splitlines() if line.startswith("TOO LITTLE")]
    assert f"train.window=2 shards take {sum(train[:2]) / 1e3:.3g} kB" in line and "cache.local_gb=4.1e-05," in line


def test_hours_are_images_by_rate_and_steps_by_seconds(tmp_path):
    found = plan.run(tiny.load(tmp_path), plan.Settings(images=5, steps=2, gpus=[1, 2, 3]))
    assert found.taught and (found.taught.images, found.taught.failed) == (10, 0)
    assert found.rate == 10 / found.taught.seconds
    assert found.teacher_hours == pytest.approx(32 / found.rate / 3600)
    assert found.steps == 12 and found.training_hours == 12 * found.seconds / 3600 > 0
    shown = plan.text(found, "tiny.yaml")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["devices like this", "1", "2", "3"]
    together = found.teacher_hours + found.training_hours
    assert rows[2][1:] == [f"{1800 * h:.2g} s" for h in (found.teacher_hours, found.training_hours, together)]
    day = replace(found, missing_images=round(found.rate * 24 * 3600), seconds=4.8 * 60 / found.steps)
    assert "| 1 | 24 h | 4.8 min | 24.1 h |" in plan.text(day, "tiny.yaml")
    assert rows[3][2] == "-" and "train.batch_size=8 is not divisible by 3" in rows[3][4]
    epochs = plan.run(tiny.load(tmp_path, "train.epochs=5"), QUICK)
    assert epochs.steps == 15  # five epochs of 24 images, eight a step


def test_a_disk_that_is_too_small_is_said_with_a_limit_that_fits(tmp_path, monkeypatch):
    whole = plan.run(tiny.load(tmp_path, "cache.codec=fp32"), QUICK).disk
    assert whole
    monkeypatch.setattr(footprint.shutil, "disk_usage", lambda path: SimpleNamespace(free=whole.missing * 3 // 4))
    found = plan.run(tiny.load(tmp_path, "cache.codec=fp32"), QUICK)
    shown = plan.text(found, "tiny.yaml")
    assert found.disk and f"images.limit={found.disk.limit}, cache.codec=int8" in shown
    cut = plan.run(tiny.load(tmp_path, "cache.codec=fp32", f"images.limit={found.disk.limit}"), QUICK)
    assert cut.disk and cut.disk.missing < found.disk.free and "TOO LITTLE" not in plan.text(cut, "tiny.yaml")
    assert found.disk.limit > 8


def broken(folder, count, *overrides):
    """The toy recipe on files of which the first `count` training images, by name, cannot be decoded."""
    for split in ("train", "validation"):
        (folder / split).mkdir()
    for number in range(8):
        drawn = np.random.default_rng(number).integers(0, 255, (64, 48, 3), np.uint8)
        for split in ("train", "validation"):
            Image.fromarray(drawn).save(folder / split / f"{number}.png")
        if number < count:
            (folder / f"train/{number}.png").write_bytes(b"no image")
    files = [f"images.root={folder}/train", f"images.validation_root={folder}/validation"]
    return tiny.load(folder, "images.name=folder", *files, *overrides)


def test_images_that_would_stop_the_pass_are_said_with_the_setting(tmp_path):
    settings = broken(tmp_path, 1)
    found = plan.run(settings, QUICK)
    assert found.taught and (found.taught.images, found.taught.failed) == (12, 1)
    (line,) = [line for line in plan.text(found, "tiny.yaml").splitlines() if line.startswith("WOULD STOP")]
    assert "8.3% of the images" in line and "cache.max_failed=0.01." in line
    with pytest.raises(UserError, match="max_failed=0.01"):
        cache.run(settings)
    assert line.endswith("set cache.max_failed=0.09") and settings.cache
    allowed = replace(settings, cache=replace(settings.cache, max_failed=0.09))
    assert "WOULD STOP" not in plan.text(plan.run(allowed, QUICK), "tiny.yaml")
    cache.run(allowed)


@pytest.mark.parametrize("count", [1, 5])
def test_a_handful_of_broken_images_is_enlarged(count, tmp_path):
    found = plan.run(broken(tmp_path, count), plan.Settings(images=1, steps=1))
    assert found.taught and found.taught.failed == count and found.seconds > 0


def test_without_an_image_that_can_be_decoded_there_is_nothing_to_plan(tmp_path):
    with pytest.raises(UserError, match="none of the handful can be trained on"):
        plan.run(broken(tmp_path, 8), plan.Settings(images=1, steps=1))


def test_without_a_cached_teacher_training_alone_is_planned(tmp_path):
    live = plan.run(tiny.load(tmp_path, "teacher.live=true", "cache=null"), QUICK)
    assert live.disk is None and live.taught is None and live.teacher_hours == 0 < live.training_hours
    assert "none: teacher.live=true" in plan.text(live, "tiny.yaml")
    digits(tmp_path)
    labels = recipe.load(tmp_path / "teacher.yaml", ["train.workers=0"])
    assert labels.teacher is None
    alone = plan.run(labels, QUICK)
    assert alone.disk is None and "none: no teacher" in plan.text(alone, "teacher.yaml") and alone.seconds > 0


def test_of_many_shards_a_sample_is_counted():
    class Uneven:
        def count(self, name):
            return 10 + int(name) % 2

    shards = [Shard(str(i), "train") for i in range(200)] + [Shard("cut", "validation", take=3)]
    counts, whole = footprint.count(Images(Uneven()), shards)  # type: ignore[arg-type]
    assert not whole and len(counts) == 201 and counts[-1] == 3
    assert sum(counts[:-1]) == pytest.approx(2100, rel=0.05)
    assert footprint.count(Images(Uneven()), shards[:9]) == ([10.0, 11.0] * 4 + [10.0], True)  # type: ignore[arg-type]


def test_repeated_data_give_the_same_items():
    data = SimpleNamespace(counts=(2, 1), item=lambda epoch, shard, index: (epoch, shard, index))
    repeated = Repeated(data, 8)
    assert repeated.counts == (6, 3) and repeated.item(1, 0, 5) == (1, 0, 1) and repeated.item(0, 1, 2) == (0, 1, 0)


def test_what_cannot_be_planned_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="only 24 training images"):
        plan.run(tiny.load(tmp_path, "train.batch_size=32"), QUICK)
    for wrong, said in (
        ("images=0", "plan.images=0"),
        ("gpus=[]", "plan.gpus"),
        ("gpus=0", "plan.gpus=0"),
        ("step=3", "Did you mean 'steps'"),
    ):
        with pytest.raises(UserError, match=said):
            verb_settings("plan", plan.Settings, [f"plan.{wrong}"])
    made = verb_settings("plan", plan.Settings, ["train.steps=3", "plan.gpus=[1, 16]", "plan.images=4"])
    assert made == (plan.Settings(images=4, gpus=[1, 16]), ["train.steps=3"])
    assert verb_settings("plan", plan.Settings, ["plan.gpus=8"])[0].devices == [8]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        plan.run(tiny.load(tmp_path), QUICK)


def test_the_verb_prints_the_plan(tmp_path, capsys):
    assert main(["plan", str(tiny.write(tmp_path)), "plan.images=2", "plan.steps=1", "cache.codec=fp32"]) == 0
    shown = capsys.readouterr().out
    assert "24 train in 3 shards, 8 validation in 1 shards (counted)" in shown and "cache.codec=fp32" in shown
    assert main(["plan", str(tmp_path / "tiny.yaml"), "plan.steps=0"]) == 2
    assert "plan.steps=0: expected 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (49_600, "49.6 kB"),
        (999_900, "1 MB"),
        (4.2e6, "4.2 MB"),
    ],
)
def test_bytes_are_told_in_a_unit_of_their_size(count, shown):
    assert plan._bytes(count) == shown
