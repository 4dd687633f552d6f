"""A whole job with a toy DINOv3 of timm: cached, verified, planned, distilled, judged, reported and exported."""

import json
import math
import shutil
import stat
from pathlib import Path

import PIL.Image
import pytest
import timm
import timm_toys
import torch
from safetensors import safe_open

from fmdistill import cache, distill, evaluate, export, pipeline, recipe, report, teachers
from fmdistill.cache.dataset import CachedImages
from fmdistill.cli import main
from fmdistill.evaluate.results import value
from fmdistill.pipeline import bench, plan
from fmdistill.registry import UserError


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A folder with the job's cache and run, evaluated by both protocols."""
    folder = tmp_path_factory.mktemp("timm")
    timm_toys.write_job(folder)
    for name in ("cosine", "knn"):
        (folder / f"{name}.yaml").write_text(f"name: {name}\nbatch: 4\nworkers: 0\n" + "ks: [3]\n" * (name == "knn"))
    settings = timm_toys.load(folder, f"protocols=[{folder}/cosine.yaml, {folder}/knn.yaml]")
    pipeline.run(settings)
    return folder


def plainly(folder: Path, split: str) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Return the classes, embeddings and tokens of a split's files, by timm alone."""
    model = timm.create_model(f"local-dir:{folder}/teacher", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    files = sorted((folder / split).rglob("*.png"))
    image = torch.stack([transform(PIL.Image.open(path).convert("RGB")) for path in files])
    with torch.no_grad():
        _, (tokens,) = model.forward_intermediates(image, indices=1, norm=True)
        return [path.parent.name for path in files], model(image), tokens


def stored(settings: recipe.Recipe, output: str) -> torch.Tensor:
    """Return what the cache holds of the validation images, in the order of their keys."""
    data = CachedImages(cache.open_cache(settings), "validation")
    batch = data.batch([(shard, index) for shard, count in enumerate(data.counts) for index in range(count)])
    order = sorted(range(len(batch["keys"])), key=lambda i: batch["keys"][i])
    return batch["outputs"][f"timm.{output}"][order]


def test_the_cache_holds_timm_s_embeddings_and_no_head(ran):
    settings = timm_toys.load(ran)
    opened = cache.open_cache(settings)
    assert opened.manifest["family"] == "timm" and opened.manifest["head"] is False
    assert opened.shapes == {"embedding": (32,)} and opened.record.head is None
    assert not list((ran / "cache").glob("head.*"))
    _, expected, _ = plainly(ran, "val")
    assert expected.shape == (6, 32) and expected.std(0).min() > 1e-3
    torch.testing.assert_close(stored(settings, "embedding"), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="of the family 'timm' has no head"):
        opened.head()


def test_verify_recomputes_and_a_second_run_opens_no_teacher(ran, monkeypatch):
    settings = timm_toys.load(ran)
    assert cache.verify(settings, samples=8)["shards"] == 4
    monkeypatch.setattr(teachers, "build", None)
    cache.run(settings)
    pipeline.run(timm_toys.load(ran, f"protocols=[{ran}/cosine.yaml]"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="this cache is another one"):
        cache.run(timm_toys.load(ran, "teacher.tokens=true"))


def test_a_finished_job_whose_teacher_is_gone_runs_on_a_read_only_copy(ran, tmp_path):
    for name in ("cache", "train", "val", "teacher"):
        shutil.copytree(ran / name, tmp_path / name)
    (tmp_path / "timm.yaml").write_text((ran / "timm.yaml").read_text().replace(str(ran), str(tmp_path)))
    (tmp_path / "teacher/model.safetensors").unlink()
    settings = timm_toys.load(tmp_path)
    paths = [tmp_path / "cache", *(tmp_path / "cache").iterdir()]
    before = {path.name: path.stat().st_mtime_ns for path in paths}
    for path in paths:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        cache.run(settings)
        assert cache.verify(settings) == {"shards": 4}
        assert (distill.run(settings) / "student.safetensors").is_file()
        assert {path.name: path.stat().st_mtime_ns for path in paths} == before
        other = timm_toys.load(tmp_path, "teacher.image_size=64")
        with pytest.raises(UserError, match="image_size"):
            cache.run(other)
    finally:
        (tmp_path / "cache").chmod(0o755)


def test_a_bucket_takes_a_cache_without_a_head(ran, tmp_path):
    near = timm_toys.load(ran)
    overrides = [f"cache.root=file://{tmp_path}/bucket", f"cache.local={tmp_path}/one", f"out={tmp_path}/run"]
    far = timm_toys.load(ran, *overrides)
    cache.run(far)
    names = {path.name for path in (tmp_path / "bucket").iterdir()}
    assert {"manifest.json", "recipe.yaml"} < names and not any(name.startswith("head") for name in names)
    again = timm_toys.load(ran, *overrides[:1], f"cache.local={tmp_path}/two", overrides[2])
    cache.run(again)
    rows = [reader.read(i)["embedding"].tobytes() for settings in (near, again)
            for reader in cache.open_cache(settings).shards["train"] for i in range(len(reader.keys))]  # fmt: skip
    assert len(rows) == 36 and rows[:18] == rows[18:]
    distill.run(again)


def test_student_teacher_and_floors_are_judged(ran):
    cosine = json.loads((ran / "run/evaluation/cosine.json").read_text())["rows"]
    assert {row["subject"] for row in cosine} == {"student", "mean embedding"}
    assert -1 <= value(cosine, "cosine") < 1
    knn = json.loads((ran / "run/evaluation/knn.json").read_text())["rows"]
    assert {row["subject"] for row in knn} == {"student", "teacher", "majority class"}
    (labels, bank, _), (classes, queries, _) = plainly(ran, "train"), plainly(ran, "val")
    hits = 0
    for name, query in zip(classes, queries, strict=True):
        cosine_N = torch.cosine_similarity(bank, query[None], dim=1).tolist()
        votes = dict.fromkeys(sorted(set(labels)), 0.0)
        for index in sorted(range(len(labels)), key=lambda i: -cosine_N[i])[:3]:
            votes[labels[index]] += math.exp(cosine_N[index] / 0.07)
        hits += max(votes, key=lambda label: votes[label]) == name
    assert hits > 1 and value(knn, "top1", "teacher", k=3) == pytest.approx(hits / 6)
    assert value(knn, "top1", "majority class", k=3) == pytest.approx(1 / 6)
    shown = report.text([str(ran / "run")])
    assert "k-NN top-1" in shown and "cosine" in shown and "majority class" in shown
    page = report.run([str(ran / "run")], str(ran / "report")).read_text()
    assert "No pictures" not in page and "Weights of images" in page


def test_plan_bench_and_inspect_tell_of_it(ran, tmp_path, capsys):
    settings = timm_toys.load(ran, f"cache.root={tmp_path}/cache", f"out={tmp_path}/run")
    planned = plan.run(settings, plan.PlanSettings(images=4, steps=1))
    sizes = sum(path.stat().st_size for path in (ran / "cache").glob("*.tar"))
    assert planned.disk and planned.disk.tars[planned.disk.codec] == sizes
    assert planned.disk.beside == (ran / "cache/manifest.json").stat().st_size
    measured = bench.run(settings, bench.BenchSettings(images=2, rounds=1, megabytes=0.01, weights="random"))
    against = {row["what"]: row["against"] for row in measured["rows"]}
    assert against["teacher, resize included"] == "timm model(image), fp32"
    assert against["decode and resize, a thread"] == "PIL and the transform of timm"
    (shard, *_) = sorted((ran / "cache").glob("*.tar"))
    assert main(["inspect", str(shard), f"out={tmp_path}/map.png"]) == 0
    assert "images of timm" in capsys.readouterr().out


def test_tokens_train_a_student_that_makes_them(ran, tmp_path):
    settings = timm_toys.load(
        ran, "teacher.tokens=true", f"cache.root={tmp_path}/cache", f"out={tmp_path}/run", "cache.similarity=true",
        "student={name: 'test_timm_job:Tokens'}", "objective.embedding.weighting={name: uniform}",
        "objective.tokens={output: tokens, distance: {name: mse}, weighting: {name: srw}}",
    )  # fmt: skip
    pipeline.check(settings)
    cache.run(settings)
    assert cache.open_cache(settings).shapes == {
        "embedding": (32,), "tokens": (32, 4, 4), "tokens_similarity": (2, 4, 4),
    }  # fmt: skip
    expected = plainly(ran, "val")[2]
    torch.testing.assert_close(stored(settings, "tokens"), expected, atol=1e-5, rtol=1e-5)
    student = distill.load_student(distill.run(settings), trust=True)
    (tmp_path / "tokens.yaml").write_text("name: cosine\noutput: tokens\nworkers: 0\n")
    rows = evaluate.run(tmp_path / "tokens.yaml", tmp_path / "run", ["trust=true"])
    data = CachedImages(cache.open_cache(settings), "validation")
    batch = data.batch([(0, index) for index in range(6)])
    with torch.no_grad():
        made = student(data.cache.preprocess.normalize(batch["pixels"], batch["sizes"]))["tokens"]
    cosine = torch.cosine_similarity(made, batch["outputs"]["timm.tokens"], dim=1).mean()
    assert value(rows, "cosine") == pytest.approx(float(cosine), abs=1e-5)


class Tokens(torch.nn.Module):
    """Patches as tokens, and their mean."""

    image_size, out_channels = 32, 32

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Conv2d(3, 32, 8, 8)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = self.net(image)
        return {"embedding": tokens.mean((2, 3)), "tokens": tokens}


def test_only_vectors_refuse_what_is_made_for_maps(ran):
    with pytest.raises(UserError, match=r"cache\.similarity=true: teacher\.name=timm makes no map .*teacher\.tokens"):
        pipeline.check(timm_toys.load(ran, "cache.similarity=true"))
    with pytest.raises(UserError, match=r"cache\.trim=true: teacher\.name=timm pads no image"):
        pipeline.check(timm_toys.load(ran, "cache.trim=true"))


def test_the_run_is_exported_for_timm(ran, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    assert main(["export", str(ran / "run"), "timm", str(out)]) == 0
    with safe_open(out, "pt") as file:
        config = json.loads(file.metadata()["timm"])
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.4, 0.3] and config["pretrained_cfg"]["crop_pct"] == 0.875
    model = timm.create_model(
        config["architecture"], num_classes=32, checkpoint_path=out, **config["model_args"]
    ).eval()
    student = distill.load_student(ran / "run")
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = student(image)["embedding"]
        torch.testing.assert_close(model(image), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 1e-3
    with pytest.raises(
        UserError, match=r"is a folder, but timm is one file; name the file, such as .*model\.safetensors"
    ):
        export.run(ran / "run", "timm", tmp_path)
    with pytest.raises(UserError, match="has no text tower; openclip exports"):
        export.run(ran / "run", "openclip", tmp_path / "openclip")


def test_the_shipped_recipes_are_for_this_family():
    for name in ("dinov3", "dinov3_srw"):
        loaded = recipe.load(f"recipes/timm/{name}.yaml")
        pipeline.check(loaded)
        record = teachers.family_of(loaded.teacher)
        assert record is not None and record.name == "timm" and loaded.student["name"] == "tinyvit_clip"
        model = timm.create_model(loaded.teacher["model"], num_classes=0) if loaded.teacher else None
        assert model is not None and model.num_features == loaded.student["embed_dim"]
        assert loaded.student["image_size"] == loaded.teacher["image_size"]
