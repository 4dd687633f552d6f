"""Tests of the bench: its figures agree with each other and with real files, and its references with the teacher."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import toy_digits
from nondegenerate import tiny_sam
from PIL import Image
from segment_anything import sam_model_registry

from fmdistill import cache, recipe, teachers
from fmdistill.backbones.throughput import flops, matmul_flops, take_turns
from fmdistill.cache.codec import CODECS
from fmdistill.cache.footprint import END
from fmdistill.cli import main
from fmdistill.distill import tasks
from fmdistill.distill.train import Engine
from fmdistill.images import build, decode
from fmdistill.pipeline import bench, training_speed
from fmdistill.pipeline.bench import with_random_weights
from fmdistill.registry import UserError
from fmdistill.teachers.output import Output

QUICK = bench.BenchSettings(images=3, rounds=1, megabytes=0.05, steps=2)
CPU = torch.device("cpu")


@pytest.fixture
def vit_b(monkeypatch):
    """Replace SAM ViT-B by a tiny network."""
    monkeypatch.setitem(sam_model_registry, "vit_b", tiny_sam)


def official(folder: Path, *overrides: str):
    return tiny.load(folder, "teacher.name=sam_vit_b", "teacher.device=cpu", "teacher.batch=2", *overrides)


def test_a_teacher_without_its_weights_is_measured(vit_b, tmp_path):
    settings = official(tmp_path)
    report = bench.run(settings, bench.BenchSettings(images=3, rounds=2, megabytes=0.05, steps=2, weights="random"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "tiny.yaml"]  # and no temporary folder
    assert json.loads((tmp_path / "run/bench.json").read_text()) == report
    rows = {row["what"]: row for row in report["rows"]}
    assert all(row["figure"] > 0 for what, row in rows.items() if not what.startswith("training: "))
    assert all(row["ratio"] == row["figure"] / row["other"] for row in report["rows"] if row["other"])
    measured = rows["teacher, resize included"]
    assert measured["against"] == "SamPredictor.set_image, fp32"
    arithmetic = next(row for what, row in rows.items() if what.startswith("arithmetic"))
    operations = flops(tiny_sam().image_encoder, torch.zeros(1, 3, 64, 64))
    assert arithmetic["figure"] == pytest.approx(measured["figure"] * operations / 1e9)
    for codec in CODECS:
        assert {f"{codec}: {what}" for what in ("encode", "decode", "write a shard", "read again")} <= rows.keys()
    training, waiting = rows["training"], rows["training: waiting for data"]
    assert training["against"] == waiting["against"] == "DataLoader of .npy files"
    assert all(0 <= waiting[side] <= 100 for side in ("figure", "other"))
    shown = bench.text(report)
    assert "WEIGHTS DRAWN AT RANDOM" in shown and len(shown.splitlines()) == 4 + len(report["rows"])


def test_both_loaders_of_the_training_measurement_give_the_same_batches(tmp_path):
    settings = tiny.load(tmp_path, "cache.codec=fp32", "train.batch_size=3", f"cache.root={tmp_path}/two/cache")
    (tmp_path / "two").mkdir()
    small = training_speed.with_few_images(settings, 2, tmp_path / "two")
    training_speed.measure_teacher_pass(small, tiny.teacher())
    job, engine = tasks.build(small), Engine(small.train)
    own = [job.complete(batch) for batch in training_speed._own_batches(small, job, engine, 6)]
    plain = list(training_speed._plain_batches(small, job, engine, tmp_path / "two", 6))
    assert len(own) == len(plain) == 2
    for first, second in zip(own, plain, strict=True):
        assert first["keys"] == second["keys"]
        assert torch.equal(first["pixels"], second["pixels"]) and torch.equal(first["sizes"], second["sizes"])
        assert torch.equal(first["outputs"]["sam.embedding"], second["outputs"]["sam.embedding"])


def bf16_teacher():
    """Return a teacher that chooses its own precision, like SAM on a CPU with bf16 products."""
    return tiny.teacher(dtype="bf16")


@pytest.mark.slow
def test_the_reported_precision_is_the_teachers(vit_b, tmp_path):
    report = bench.run(tiny.load(tmp_path, "teacher.name=test_pipeline_bench:bf16_teacher"), QUICK)
    assert report["dtype"] == "bf16"
    assert "bf16 matrix product" in {row["against"] for row in report["rows"]}
    exact = teachers.build(with_random_weights({"name": "sam_vit_b", "device": "cpu", "exact": True}, tmp_path))
    exact.device = torch.device("cuda")  # "auto" is bf16, except for an exact teacher
    assert bench._dtype(exact) == "fp32"


def test_the_disk_of_a_buckets_local_copies_is_measured(tmp_path, monkeypatch):
    folders, original = [], tempfile.TemporaryDirectory
    monkeypatch.setattr(
        tempfile, "TemporaryDirectory", lambda **options: folders.append(options["dir"]) or original(**options)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    settings = tiny.load(tmp_path)
    assert settings.cache
    for local, expected in (("", tmp_path / "own"), (str(tmp_path / "run/copies"), tmp_path / "run")):
        far = replace(settings.cache, root="s3://nowhere/cache", local=local)  # never accessed
        bench.run(replace(settings, cache=far), bench.BenchSettings(images=1, rounds=1, megabytes=0.01))
        assert Path(folders.pop()) == expected and not folders


def test_the_bytes_of_an_image_equal_those_in_a_cache(tmp_path):
    settings = tiny.load(tmp_path)
    report = bench.run(settings, QUICK)
    cache.run(settings)
    rows = {row["what"]: row for row in report["rows"]}
    tars = list((tmp_path / "cache").glob("*.tar"))
    train = next(path for path in tars if '"train"' in path.with_suffix(".json").read_text())
    real = (train.stat().st_size - END) / 8
    written = 24  # images in the bench's shard, of 2048 bytes each in float32
    assert rows["fp16: an image in a shard"]["figure"] == pytest.approx(real + END / written)
    assert rows["fp16: an image in a shard"]["ratio"] == pytest.approx(1)
    assert rows["teacher, resize included"]["other"] is None  # a teacher of no other package
    assert "the recipe's weights" in bench.text(report)


@pytest.mark.parametrize("kind", ["sam_mini", "clip_mini"])
def test_the_reference_computes_the_teachers_outputs(kind, tmp_path):
    settings = {"name": kind, "weights": "packaged", "device": "cpu", "dtype": "fp32"}
    settings |= {"exact": True} if kind == "sam_mini" else {}
    model = teachers.build(settings)
    plain = teachers.family_of(settings).reference(model)
    images = build({"name": "photos", "train": 2, "validation": 1, "size": 80})
    stored = list(images.read(images.shards()[0]))[:2]
    ready = [model.preprocess.prepare(decode(encoded.data)) for encoded in stored]
    pixels, sizes = torch.stack([p for p, _ in ready]), torch.tensor([s for _, s in ready])
    assert plain
    torch.testing.assert_close(
        plain.embed([Image.fromarray(decode(encoded.data)) for encoded in stored]),
        model(pixels, sizes)["embedding"],
        atol=1e-4,
        rtol=1e-3,
    )
    assert plain.flops() == flops(model, pixels[:1], sizes[:1]) > 0
    if kind == "sam_mini":
        assert all(torch.equal(plain.pixels(item.data), p) for item, (p, _) in zip(stored, ready, strict=True))


def test_random_weights_are_drawn_for_every_kind_of_teacher(vit_b, tmp_path):
    sam = teachers.build(with_random_weights({"name": "sam_vit_b", "device": "cpu"}, tmp_path))
    assert sam.fingerprint()["name"] == "sam_vit_b"
    toy_digits.write(tmp_path)
    student = recipe.load(tmp_path / "student.yaml")
    assert student.teacher
    assert teachers.build(with_random_weights(student.teacher, tmp_path)).outputs["logits"] == Output((10,))
    assert with_random_weights({"name": "open_clip", "pretrained": "openai"}, tmp_path)["pretrained"] == "none"
    assert with_random_weights({"name": "sam_mini"}, tmp_path)["weights"] == "none"
    for other in ({"name": "tiny:teacher"}, {"name": "open_clip", "model": "local-dir:x"}):
        with pytest.raises(UserError, match="bench.weights=random: "):
            with_random_weights(other, tmp_path)


def test_a_multiply_add_counts_two_flops():
    assert flops(torch.nn.Linear(4, 5), torch.zeros(3, 4)) == 2 * 3 * 4 * 5
    assert matmul_flops(CPU, torch.float32, 0.0) > 0


@pytest.mark.parametrize("waits", [False, True])
def test_works_take_turns(waits):
    calls = []
    seconds = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, CPU, 3, waits)
    assert calls == ["a", "b"] * 3 and seconds.keys() == {"a", "b"} and min(seconds.values()) > 0


def test_recipes_that_cannot_be_measured_raise(tmp_path):
    for overrides in (["teacher=null", "cache=null"], ["teacher.live=true", "cache=null"]):
        with pytest.raises(UserError, match="this recipe has no teacher or a live one"):
            bench.run(tiny.load(tmp_path, *overrides), QUICK)
    for wrong in ({"images": 0}, {"rounds": 0}, {"megabytes": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            bench.BenchSettings(**wrong)


def test_the_verb_prints_the_table_and_its_path(tmp_path, capsys):
    quick = ["bench.images=1", "bench.rounds=1", "bench.megabytes=0.01"]
    assert main(["bench", str(tiny.write(tmp_path)), *quick]) == 0
    output, log = capsys.readouterr()
    parts = [
        "loading teacher tiny",
        "decoding 1 images",
        "the teacher",
        *(f"codec {name}," for name in CODECS),
        "5 training steps",
    ]
    lines = [line for line in log.splitlines() if "bench: " in line]
    assert len(lines) == len(parts) and all(part in line for part, line in zip(parts, lines, strict=True))
    assert "| fp16: write a shard |" in output and output.endswith(f"{tmp_path}/run/bench.json\n")
