"""Tests of the plan: its figures agree with the job that follows, and measuring leaves no files."""

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
from fmdistill.pipeline.rehearsal import RepeatedData, verb_settings
from fmdistill.registry import UserError

QUICK = plan.PlanSettings(images=6, steps=1)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Redirect temporary files to a folder, and check that each test leaves it empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not list(folder.iterdir())


def sizes(root: Path, suffix: str) -> int:
    return sum(path.stat().st_size for path in root.glob(f"*{suffix}"))


def captioned(folder, *overrides):
    small = ["images.train=70", "images.validation=20", "train.batch_size=8", "train.steps=9", "train.workers=0"]
    folders = [f"cache.root={folder}/cache", f"out={folder}/run", "teacher.weights=none", "teacher.batch=8"]
    return recipe.load("recipes/demo/clip_mse.yaml", [*small, *folders, *overrides])


def digits(folder):
    toy_digits.trained(folder)
    return recipe.load(folder / "student.yaml", ["train.workers=0"])


@pytest.mark.parametrize("load", [tiny.load, captioned, digits])
def test_bytes_equal_those_of_the_cache(load, tmp_path):
    settings = load(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    estimate = plan.run(settings, QUICK)
    assert sorted(tmp_path.rglob("*")) == before and estimate.disk
    cache.run(settings)
    root = Path(settings.cache.root)
    heads = sum(p.stat().st_size for p in root.iterdir() if p.name.startswith(("manifest", "head")))
    sidecars = sizes(root, ".json") - sum(p.stat().st_size for p in (root / "manifest.json", root / "head.json"))
    assert estimate.disk.tars[estimate.disk.codec] == sizes(root, ".tar")
    assert estimate.disk.sidecars == pytest.approx(sidecars, rel=0.1)
    assert estimate.disk.beside == heads
    assert estimate.disk.missing == pytest.approx(sizes(root, ".tar") + sidecars, rel=0.1)
    opened = cache.open_cache(settings)
    assert estimate.images == {split: sum(len(s.keys) for s in shards) for split, shards in opened.shards.items()}
    assert estimate.shards == {split: len(shards) for split, shards in opened.shards.items()} and estimate.counted


def test_every_codec_is_predicted_and_existing_shards_are_not_counted_again(tmp_path):
    estimate = plan.run(tiny.load(tmp_path), QUICK)
    assert estimate.disk and estimate.disk.tars.keys() == {*CODECS, "fp16-trimmed"} and estimate.missing_images == 32
    for codec in CODECS:
        settings = tiny.load(tmp_path, f"cache.codec={codec}", f"cache.root={tmp_path}/{codec}")
        cache.run(settings)
        assert sizes(tmp_path / codec, ".tar") == estimate.disk.tars[codec]
    with pytest.raises(UserError, match="this cache is another one"):
        plan.run(tiny.load(tmp_path, f"cache.root={tmp_path}/fp16", "cache.codec=fp32"), QUICK)
    first = cache.open_cache(settings).shards["train"][0].path
    first.with_suffix(".json").unlink()  # to be made anew
    before = sorted(tmp_path.rglob("*"))
    again = plan.run(settings, QUICK)
    assert again.disk and again.disk.missing_shards == 1 and again.missing_images == 8
    assert first.stat().st_size < again.disk.missing < 3 * first.stat().st_size  # and a sidecar
    assert sorted(tmp_path.rglob("*")) == before


def test_trimmed_sizes_are_predicted_and_named_by_their_settings(tmp_path):
    every = plan.PlanSettings(images=24, steps=1)
    estimate = plan.run(tiny.load(tmp_path), every)
    trimmed = ["objective.embedding.padding=exclude", "cache.codec=fp16", "cache.trim=true"]
    own = plan.run(tiny.load(tmp_path, *trimmed), every)
    assert estimate.disk and own.disk and own.disk.codec == "fp16-trimmed"
    assert (
        estimate.disk.tars == pytest.approx(own.disk.tars, rel=0.01)
        and own.disk.tars.keys() == estimate.disk.tars.keys()
    )
    cache.run(tiny.load(tmp_path, *trimmed))
    assert sizes(tmp_path / "cache", ".tar") == own.disk.tars["fp16-trimmed"] < own.disk.tars["fp16"]
    shown = plan.text(estimate, "tiny.yaml"), plan.text(own, "tiny.yaml")
    assert "with cache.codec=fp16 in" in shown[0] and "with cache.codec=fp16 cache.trim=true in" in shown[1]
    assert all("fp16 with cache.trim=true" in text and "-trimmed" not in text for text in shown)


def test_the_plan_states_what_a_killed_process_loses(tmp_path):
    estimate = plan.run(tiny.load(tmp_path, "images.shard_size=10"), QUICK)
    assert estimate.disk and [(split, images) for split, images, _ in estimate.disk.held] == [
        ("train", 10),
        ("train", 10),
        ("validation", 8),
        ("train", 4),
    ]
    (line,) = [line for line in plan.text(estimate, "tiny.yaml").splitlines() if line.startswith("a shard ")]
    assert re.search(r"up to 10 images, [\d.]+ kB, ", line) and line.endswith(
        " s of the teacher: the most that a killed process loses"
    )
    cache.run(tiny.load(tmp_path, "images.shard_size=10"))
    again = plan.run(tiny.load(tmp_path, "images.shard_size=10"), QUICK)
    assert "a shard " not in plan.text(again, "tiny.yaml")  # nothing is left to lose


def test_the_plan_warns_if_a_window_exceeds_the_local_copies_of_a_bucket(tmp_path):
    settings = tiny.load(tmp_path)
    assert settings.cache
    far = replace(settings.cache, root=f"file://{tmp_path}/bucket", local=str(tmp_path / "here"))
    estimate = plan.run(replace(settings, cache=far), QUICK)
    assert estimate.disk
    shown = plan.text(estimate, "tiny.yaml")
    assert f"in file://{tmp_path}/bucket, copies in {tmp_path}/here" in shown and "TOO LITTLE" not in shown
    train = [size for split, _, size in estimate.disk.held if split == "train"]
    small = replace(estimate, recipe=replace(settings, cache=replace(far, local_gb=1.5 * train[0] / 1e9)))
    (line,) = [line for line in plan.text(small, "tiny.yaml").splitlines() if line.startswith("TOO LITTLE")]
    assert f"train.window=2 shards take {sum(train[:2]) / 1e3:.3g} kB" in line and "cache.local_gb=4.1e-05," in line


def test_hours_are_images_over_rate_and_steps_times_seconds(tmp_path):
    estimate = plan.run(tiny.load(tmp_path), plan.PlanSettings(images=5, steps=2, gpus=[1, 2, 3]))
    assert estimate.teacher_pass and (estimate.teacher_pass.images, estimate.teacher_pass.failed) == (10, 0)
    assert estimate.rate == 10 / estimate.teacher_pass.seconds
    assert estimate.teacher_hours == pytest.approx(32 / estimate.rate / 3600)
    assert estimate.steps == 12 and estimate.training_hours > 0
    assert estimate.training_hours == pytest.approx(12 * estimate.seconds / 3600)
    shown = plan.text(estimate, "tiny.yaml")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["devices like this", "1", "2", "3"]
    together = estimate.teacher_hours + estimate.training_hours
    assert rows[2][1:] == [f"{1800 * h:.2g} s" for h in (estimate.teacher_hours, estimate.training_hours, together)]
    training = {"": replace(estimate.training[""], seconds=4.8 * 60 / estimate.steps)}
    day = replace(estimate, missing_images=round(estimate.rate * 24 * 3600), training=training)
    assert "| 1 | 24 h | 4.8 min | 24.1 h |" in plan.text(day, "tiny.yaml")
    assert rows[3][2] == "-" and "train.batch_size=8 is not divisible by 3" in rows[3][4]
    epochs = plan.run(tiny.load(tmp_path, "train.epochs=5"), QUICK)
    assert epochs.steps == 15  # five epochs of 24 images, eight a step


def test_the_plan_warns_of_a_small_disk_with_a_limit_that_fits(tmp_path, monkeypatch):
    whole = plan.run(tiny.load(tmp_path, "cache.codec=fp32"), QUICK).disk
    assert whole
    monkeypatch.setattr(footprint.shutil, "disk_usage", lambda path: SimpleNamespace(free=whole.missing * 3 // 4))
    estimate = plan.run(tiny.load(tmp_path, "cache.codec=fp32"), QUICK)
    shown = plan.text(estimate, "tiny.yaml")
    assert estimate.disk and f"images.limit={estimate.disk.limit}, cache.codec=int8" in shown
    cut = plan.run(tiny.load(tmp_path, "cache.codec=fp32", f"images.limit={estimate.disk.limit}"), QUICK)
    assert cut.disk and cut.disk.missing < estimate.disk.free and "TOO LITTLE" not in plan.text(cut, "tiny.yaml")
    assert estimate.disk.limit > 8


def broken(folder, count, *overrides):
    """Return the toy recipe on files, of which the first `count` training images cannot be decoded."""
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


def test_the_plan_warns_of_failing_images_with_the_setting(tmp_path):
    settings = broken(tmp_path, 1)
    estimate = plan.run(settings, QUICK)
    assert estimate.teacher_pass and (estimate.teacher_pass.images, estimate.teacher_pass.failed) == (12, 1)
    (line,) = [line for line in plan.text(estimate, "tiny.yaml").splitlines() if line.startswith("WOULD STOP")]
    assert "8.3% of the images" in line and "cache.max_failed=0.01." in line
    with pytest.raises(UserError, match="max_failed=0.01"):
        cache.run(settings)
    assert line.endswith("set cache.max_failed=0.09") and settings.cache
    allowed = replace(settings, cache=replace(settings.cache, max_failed=0.09))
    assert "WOULD STOP" not in plan.text(plan.run(allowed, QUICK), "tiny.yaml")
    cache.run(allowed)


@pytest.mark.parametrize("count", [1, 5])
def test_more_images_are_measured_if_all_are_broken(count, tmp_path):
    estimate = plan.run(broken(tmp_path, count), plan.PlanSettings(images=1, steps=1))
    assert estimate.teacher_pass and estimate.teacher_pass.failed == count and estimate.seconds > 0


def test_a_plan_without_decodable_images_raises(tmp_path):
    with pytest.raises(UserError, match="none of the images measured can be trained on"):
        plan.run(broken(tmp_path, 8), plan.PlanSettings(images=1, steps=1))


def test_without_a_cached_teacher_only_training_is_planned(tmp_path):
    live = plan.run(tiny.load(tmp_path, "teacher.live=true", "cache=null"), QUICK)
    assert live.disk is None and live.teacher_pass is None and live.teacher_hours == 0 < live.training_hours
    assert "none: teacher.live=true" in plan.text(live, "tiny.yaml")
    digits(tmp_path)
    labels = recipe.load(tmp_path / "teacher.yaml", ["train.workers=0"])
    assert labels.teacher is None
    only_training = plan.run(labels, QUICK)
    assert only_training.disk is None and only_training.seconds > 0
    assert "none: no teacher" in plan.text(only_training, "teacher.yaml")


def test_only_some_of_many_shards_are_counted():
    class Uneven:
        def count(self, name):
            return 10 + int(name) % 2

    shards = [Shard(str(i), "train") for i in range(200)] + [Shard("cut", "validation", take=3)]
    counts, whole = footprint.count(Images(Uneven()), shards)  # type: ignore[arg-type]
    assert not whole and len(counts) == 201 and counts[-1] == 3
    assert sum(counts[:-1]) == pytest.approx(2100, rel=0.05)
    assert footprint.count(Images(Uneven()), shards[:9]) == ([10.0, 11.0] * 4 + [10.0], True)  # type: ignore[arg-type]


def test_repeated_data_return_the_same_items():
    data = SimpleNamespace(counts=(2, 1), item=lambda epoch, shard, index: (epoch, shard, index))
    repeated = RepeatedData(data, 8)
    assert repeated.counts == (6, 3) and repeated.item(1, 0, 5) == (1, 0, 1) and repeated.item(0, 1, 2) == (0, 1, 0)


def test_recipes_that_cannot_be_planned_raise(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="only 24 training images"):
        plan.run(tiny.load(tmp_path, "train.batch_size=32"), QUICK)
    for wrong, message in (
        ("images=0", "plan.images=0"),
        ("gpus=[]", "plan.gpus"),
        ("gpus=0", "plan.gpus=0"),
        ("step=3", "Did you mean 'steps'"),
    ):
        with pytest.raises(UserError, match=message):
            verb_settings("plan", plan.PlanSettings, [f"plan.{wrong}"])
    parsed = verb_settings("plan", plan.PlanSettings, ["train.steps=3", "plan.gpus=[1, 16]", "plan.images=4"])
    assert parsed == (plan.PlanSettings(images=4, gpus=[1, 16]), ["train.steps=3"])
    assert verb_settings("plan", plan.PlanSettings, ["plan.gpus=8"])[0].devices == [8]
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
def test_bytes_are_shown_in_a_unit_of_their_size(count, shown):
    assert plan._bytes(count) == shown
