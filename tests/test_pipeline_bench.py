"""The bench's figures agree with each other and with real files, and a package's own loop does the teacher's work."""

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
from fmdistill.images import build, decode
from fmdistill.pipeline import bench
from fmdistill.pipeline.bench import with_random_weights
from fmdistill.registry import UserError
from fmdistill.teachers.output import Output

QUICK = bench.Settings(images=3, rounds=1, megabytes=0.05)
CPU = torch.device("cpu")


@pytest.fixture
def vit_b(monkeypatch):
    """A stand-in for SAM ViT-B of the tests' size."""
    monkeypatch.setitem(sam_model_registry, "vit_b", tiny_sam)


def official(folder: Path, *overrides: str):
    return tiny.load(folder, "teacher.name=sam_vit_b", "teacher.device=cpu", "teacher.batch=2", *overrides)


def test_a_teacher_without_its_weights_is_measured(vit_b, tmp_path):
    settings = official(tmp_path)
    found = bench.run(settings, bench.Settings(images=3, rounds=2, megabytes=0.05, weights="random"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "tiny.yaml"]  # and no temporary folder
    assert json.loads((tmp_path / "run/bench.json").read_text()) == found
    rows = {row["what"]: row for row in found["rows"]}
    assert all(row["figure"] > 0 for row in found["rows"])
    assert all(row["ratio"] == row["figure"] / row["other"] for row in found["rows"] if row["other"])
    ours = rows["teacher, resize included"]
    assert ours["against"] == "SamPredictor.set_image, fp32"
    arithmetic = next(row for what, row in rows.items() if what.startswith("arithmetic"))
    counted = flops(tiny_sam().image_encoder, torch.zeros(1, 3, 64, 64))
    assert arithmetic["figure"] == pytest.approx(ours["figure"] * counted / 1e9)
    for codec in CODECS:
        assert {f"{codec}: {what}" for what in ("encode", "decode", "write a shard", "read again")} <= rows.keys()
    shown = bench.text(found)
    assert "WEIGHTS DRAWN AT RANDOM" in shown and len(shown.splitlines()) == 4 + len(found["rows"])


def bf16_teacher():
    """A teacher that chooses its own precision, as SAM does on a CPU with bf16 products."""
    return tiny.teacher(dtype="bf16")


def test_the_precision_told_is_the_teacher_s_own(vit_b, tmp_path):
    found = bench.run(tiny.load(tmp_path, "teacher.name=test_pipeline_bench:bf16_teacher"), QUICK)
    assert found["dtype"] == "bf16"
    assert "bf16 matrix product" in {row["against"] for row in found["rows"]}
    exact = teachers.build(with_random_weights({"name": "sam_vit_b", "device": "cpu", "exact": True}, tmp_path))
    exact.device = torch.device("cuda")  # where "auto" is bf16, but not of an exact teacher
    assert bench._dtype(exact) == "fp32"


def test_a_bucket_s_copies_here_are_on_the_disk_that_is_measured(tmp_path, monkeypatch):
    asked, made = [], tempfile.TemporaryDirectory
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda **given: asked.append(given["dir"]) or made(**given))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    settings = tiny.load(tmp_path)
    assert settings.cache
    for local, found in (("", tmp_path / "own"), (str(tmp_path / "run/copies"), tmp_path / "run")):
        far = replace(settings.cache, root="s3://nowhere/cache", local=local)  # nobody asks for it
        bench.run(replace(settings, cache=far), bench.Settings(images=1, rounds=1, megabytes=0.01))
        assert Path(asked.pop()) == found and not asked


def test_an_image_s_bytes_are_those_of_a_cache(tmp_path):
    settings = tiny.load(tmp_path)
    found = bench.run(settings, QUICK)
    cache.run(settings)
    rows = {row["what"]: row for row in found["rows"]}
    tars = list((tmp_path / "cache").glob("*.tar"))
    train = next(path for path in tars if '"train"' in path.with_suffix(".json").read_text())
    real = (train.stat().st_size - END) / 8
    written = 24  # images in the bench's shard, of 2048 bytes each in float32
    assert rows["fp16: an image in a shard"]["figure"] == pytest.approx(real + END / written)
    assert rows["fp16: an image in a shard"]["ratio"] == pytest.approx(1)
    assert rows["teacher, resize included"]["other"] is None  # a teacher of no other package
    assert "the recipe's weights" in bench.text(found)


@pytest.mark.parametrize("kind", ["sam_mini", "clip_mini"])
def test_the_reference_does_the_teacher_s_work(kind, tmp_path):
    settings = {"name": kind, "weights": "packaged", "device": "cpu", "dtype": "fp32"}
    settings |= {"exact": True} if kind == "sam_mini" else {}
    model = teachers.build(settings)
    plain = teachers.family_of(settings).reference(model)
    images = build({"name": "photos", "train": 2, "validation": 1, "size": 80})
    stored = list(images.read(images.shards()[0]))[:2]
    ready = [model.preprocess.prepare(decode(one.data)) for one in stored]
    pixels, sizes = torch.stack([p for p, _ in ready]), torch.tensor([s for _, s in ready])
    assert plain
    torch.testing.assert_close(
        plain.embed([Image.fromarray(decode(one.data)) for one in stored]),
        model(pixels, sizes)["embedding"],
        atol=1e-4,
        rtol=1e-3,
    )
    assert plain.flops() == flops(model, pixels[:1], sizes[:1]) > 0
    if kind == "sam_mini":
        assert all(torch.equal(plain.pixels(one.data), p) for one, (p, _) in zip(stored, ready, strict=True))


def test_weights_are_drawn_for_every_kind_of_teacher(vit_b, tmp_path):
    sam = teachers.build(with_random_weights({"name": "sam_vit_b", "device": "cpu"}, tmp_path))
    assert sam.fingerprint()["name"] == "sam_vit_b"
    toy_digits.write(tmp_path)
    student = recipe.load(tmp_path / "student.yaml")
    assert student.teacher
    assert teachers.build(with_random_weights(student.teacher, tmp_path)).outputs["logits"] == Output((10,))
    assert with_random_weights({"name": "open_clip", "pretrained": "openai"}, tmp_path)["pretrained"] == "none"
    assert with_random_weights({"name": "sam_mini"}, tmp_path)["weights"] == "none"
    for other in ({"name": "tiny:teacher"}, {"name": "open_clip", "model": "local-dir:x"}):
        with pytest.raises(UserError, match="cannot be drawn"):
            with_random_weights(other, tmp_path)


def test_flops_are_counted_two_to_a_multiply_add():
    assert flops(torch.nn.Linear(4, 5), torch.zeros(3, 4)) == 2 * 3 * 4 * 5
    assert matmul_flops(CPU, torch.float32, 0.0) > 0


@pytest.mark.parametrize("waits", [False, True])
def test_works_take_turns(waits):
    calls = []
    found = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, CPU, 3, waits)
    assert calls == ["a", "b"] * 3 and found.keys() == {"a", "b"} and min(found.values()) > 0


def test_what_cannot_be_measured_is_said(tmp_path):
    for overrides in (["teacher=null", "cache=null"], ["teacher.live=true", "cache=null"]):
        with pytest.raises(UserError, match="this recipe has none, or a live one"):
            bench.run(tiny.load(tmp_path, *overrides), QUICK)
    for wrong in ({"images": 0}, {"rounds": 0}, {"megabytes": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            bench.Settings(**wrong)


def test_the_verb_prints_the_table_and_where_it_lies(tmp_path, capsys):
    quick = ["bench.images=1", "bench.rounds=1", "bench.megabytes=0.01"]
    assert main(["bench", str(tiny.write(tmp_path)), *quick]) == 0
    shown, said = capsys.readouterr()
    parts = ["loading teacher tiny", "decoding 1 images", "the teacher", *(f"codec {name}," for name in CODECS)]
    told = [line for line in said.splitlines() if "bench: " in line]
    assert len(told) == len(parts) and all(part in line for part, line in zip(parts, told, strict=True))
    assert "| fp16: write a shard |" in shown and shown.endswith(f"{tmp_path}/run/bench.json\n")
