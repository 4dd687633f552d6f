"""Tests of a whole toy run from two sources: its files, its rows, and its floors."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from fmdistill import cache, distill, evaluate, pipeline, teachers
from fmdistill.cache import unchanged
from fmdistill.cli import main
from fmdistill.evaluate import sa1b
from fmdistill.evaluate.results import value
from fmdistill.evaluate.subjects import mean_embedding
from fmdistill.pipeline import demo
from fmdistill.registry import UserError

PROTOCOL = "name: grid_miou\ngrids: [2, 3]\nfloors: true\n"
FLOORS = ("untrained", "mean embedding", "another image")
MIX = """
images:
  name: mix
  sources:
    photos: {name: photos, train: 12, validation: 5, size: 64, shard_size: 4}
    scenes: {name: scenes, train: 12, validation: 3, size: 64, shard_size: 4, objects: [2, 3]}
"""


class Teacher(torch.nn.Module):
    """The cached teacher's own encoder as a student; `pretrained` is the path of its weights."""

    image_size, out_channels = 64, tiny.CHANNELS

    def __init__(self, pretrained: str = "none") -> None:
        super().__init__()
        self.encoder = tiny.teacher(seed=0 if pretrained == "none" else 1, exact=True).encoder
        if pretrained != "none":
            from safetensors.torch import load_file

            self.load_state_dict(load_file(pretrained))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": torch.cat([self.encoder(item[None]) for item in image])}


def load(folder: Path, *overrides: str):
    path = tiny.write(folder)
    lines = [line for line in path.read_text().splitlines() if not line.startswith("images:")]
    lines = [line.replace('"tiny:teacher"', '"tiny:teacher", exact: true') for line in lines]
    path.write_text("\n".join(lines) + MIX + f"protocols: [{folder}/grid.yaml]\n")
    (folder / "grid.yaml").write_text(PROTOCOL)
    from fmdistill import recipe

    return recipe.load(path, overrides)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Return a folder with a finished run, and the rows that the pipeline returned."""
    folder = tmp_path_factory.mktemp("pipeline")
    (rows,) = pipeline.run(load(folder, "train.steps=60")).values()
    return folder, rows


def test_a_run_has_rows_of_each_group_for_the_student_and_every_floor(ran):
    folder, rows = ran
    expected_rows = {
        (subject, metric, f"{k}x{k}", group)
        for subject in ("student", *FLOORS)
        for k in (2, 3)
        for group in (None, "photos", "scenes")
        for metric in ("miou", "miou_per_image")
    } | {(subject, metric, None, None) for subject in ("student", *FLOORS) for metric in ("cosine", "mse")}
    assert {(row["subject"], row["metric"], row.get("grid"), row.get("group")) for row in rows} == expected_rows
    assert len(rows) == len(expected_rows)
    assert all(math.isfinite(row["value"]) for row in rows)
    assert all(0 <= row["value"] <= 1 for row in rows if "miou" in row["metric"])
    assert value(rows, "mse") < value(rows, "mse", "untrained")
    for subject in ("student", *FLOORS):
        groups = [value(rows, "miou", subject, grid="3x3", group=group) for group in ("photos", "scenes")]
        assert value(rows, "miou", subject, grid="3x3") == pytest.approx((5 * groups[0] + 3 * groups[1]) / 8)


def test_the_result_is_stored_in_the_run_with_its_protocol_and_rows(ran):
    folder, rows = ran
    stored = json.loads((folder / "run/evaluation/grid.json").read_text())
    assert stored["rows"] == rows
    assert stored["protocol"]["grids"] == [2, 3] and stored["protocol"]["select"] == "best_predicted"
    images = stored["images"]
    assert len(images) == 8 * 4 and {image["group"] for image in images} == {"photos", "scenes"}
    scenes = [i["miou"]["2x2"] for i in images if i["subject"] == "student" and i["group"] == "scenes"]
    assert value(rows, "miou", grid="2x2", group="scenes") == pytest.approx(np.mean(scenes))
    assert [path.name for path in (folder / "run/evaluation").iterdir()] == ["grid.json"]


def test_running_again_returns_the_same_rows_without_training(ran, monkeypatch):
    folder, rows = ran
    monkeypatch.setattr(distill.tasks, "build", lambda recipe: pytest.fail("trains again"))
    (again,) = pipeline.run(load(folder, "train.steps=60")).values()
    assert again == rows
    (judged,) = pipeline.evaluate_recipe(load(folder, "train.steps=60")).values()
    assert judged == rows
    with pytest.raises(
        UserError, match=r"holds a run of another recipe: train\.steps is 60 in the run and 61 in the recipe"
    ):
        pipeline.evaluate_recipe(load(folder, "train.steps=61"))


def test_the_teacher_against_itself_is_exactly_one(ran):
    folder, _ = ran
    path = folder / "teacher.safetensors"
    save_file({name: value.contiguous() for name, value in Teacher().state_dict().items()}, path)
    text = (folder / "tiny.yaml").read_text().replace("tiny:Student", "test_pipeline:Teacher")
    (folder / "self.yaml").write_text(text)
    settings = [f"recipe={folder}/self.yaml", "floors=false"]
    rows = evaluate.run(folder / "grid.yaml", path, settings)
    scores = [row["value"] for row in rows if "miou" in row["metric"]]
    assert len(scores) == 12 and set(scores) == {1.0}
    assert value(rows, "mse") < 1e-8
    for mode in ("single", "paired", "oracle"):
        again = evaluate.run(folder / "grid.yaml", path, [*settings, f"select={mode}", "grids=[2]"])
        assert {row["value"] for row in again if "miou" in row["metric"]} == {1.0}
    assert (folder / "teacher.evaluation/grid.json").is_file()


def test_a_checkpoint_file_has_the_scores_of_its_run(ran):
    folder, rows = ran
    copy = folder / "copy.safetensors"
    copy.write_bytes((folder / "run/student.safetensors").read_bytes())
    assert evaluate.run(folder / "grid.yaml", copy, [f"recipe={folder}/tiny.yaml"]) == rows
    assert json.loads((folder / "copy.evaluation/grid.json").read_text())["rows"] == rows
    copy.write_bytes(copy.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"copy\.safetensors: not a readable checkpoint of plain tensors"):
        evaluate.run(folder / "grid.yaml", copy, [f"recipe={folder}/tiny.yaml"])


def test_the_mean_embedding_is_the_plain_mean_over_the_training_images(ran):
    folder, _ = ran
    opened = cache.open_cache(load(folder))
    embeddings = []
    for path in sorted((folder / "cache").glob("*-train-*.json")):
        data = path.with_suffix(".tar").read_bytes()
        for sample in json.loads(path.read_text())["samples"]:
            member = sample["outputs"]["embedding"]
            piece = data[member["offset"] : member["offset"] + member["size"]]
            embeddings.append(np.load(io.BytesIO(piece)).astype(np.float32))
    assert len(embeddings) == 24
    np.testing.assert_allclose(mean_embedding(opened).numpy(), np.mean(embeddings, axis=0), atol=1e-6)


def test_the_floor_of_another_image_is_never_the_image_itself(ran):
    folder, _ = ran
    images = json.loads((folder / "run/evaluation/grid.json").read_text())["images"]
    other = [image for image in images if image["subject"] == "another image"]
    assert len(other) == 8 and all(image["mse"] > 1e-3 for image in other)


def test_only_the_first_of_several_processes_evaluates(ran, monkeypatch, capsys):
    folder, rows = ran
    result = folder / "run/evaluation/grid.json"
    launched = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, text in launched.items():
        monkeypatch.setenv(name, text)
    for rank, expected in (("1", {}), ("0", {f"{folder}/grid.yaml": rows})):
        result.unlink(missing_ok=True)
        monkeypatch.setenv("RANK", rank)
        assert pipeline.is_main() == (rank == "0")
        assert pipeline.run(load(folder, "train.steps=60")) == expected
        assert result.exists() == (rank == "0")
        assert main(["run", str(folder / "tiny.yaml"), "train.steps=60"]) == 0
        assert bool(capsys.readouterr().out) == (rank == "0")


def file_times(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return the times of every file and folder; writing and removing a file changes those of its folder."""
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_ctime_ns, path.stat().st_ino)
        for path in [folder, *folder.rglob("*")]
    }


def test_a_second_run_writes_loads_and_evaluates_nothing(ran, monkeypatch):
    folder, rows = ran
    monkeypatch.setattr(unchanged, "is_noted", lambda settings, root: True)  # as if all code were in the package
    first = pipeline.run(load(folder, "train.steps=60"))
    before = file_times(folder / "run") | file_times(folder / "cache")
    for module, name in ((teachers, "build"), (evaluate, "_call"), (sa1b, "judge_teacher")):
        monkeypatch.setattr(module, name, lambda *arguments, **named: pytest.fail("made again"))
    assert pipeline.run(load(folder, "train.steps=60")) == first == {f"{folder}/grid.yaml": rows}
    assert file_times(folder / "run") | file_times(folder / "cache") == before


def test_check_names_the_file_and_the_error(tmp_path):
    load(tmp_path)
    path = tmp_path / "tiny.yaml"
    assert pipeline.check_files([str(path), str(tmp_path / "grid.yaml")]) == [str(path), str(tmp_path / "grid.yaml")]
    whole = path.read_text()
    for old, new, message in (
        ("temperature: 0.5", "temprature: 0.5", "Did you mean 'temperature'"),
        ("name: adamw", "name: adam", "Did you mean 'adamw'"),
        ("objects: [2, 3]", "objects: [3, 2]", "fewest <= most"),
        ("cache: {root", "#cache: {root", "a recipe has both or neither"),
        ("student:", "studnet:", "studnet"),
    ):
        path.write_text(whole.replace(old, new))
        with pytest.raises(UserError, match=message) as caught:
            pipeline.check_files([str(path)])
        assert str(path) in str(caught.value)


def test_check_takes_settings_for_each_recipe(tmp_path, capsys):
    load(tmp_path)
    recipe, protocol = str(tmp_path / "tiny.yaml"), str(tmp_path / "grid.yaml")
    assert main(["check", recipe, "train.steps=3", protocol, "optimizer.lr=1e-4"]) == 0
    assert capsys.readouterr().out == f"{recipe}: ok\n{protocol}: ok\n"
    assert main(["check", recipe, "train.stpes=3"]) == 2
    error = capsys.readouterr().err
    assert recipe in error and "Did you mean 'steps'" in error
    assert main(["check", protocol, "train.steps=3"]) == 2
    assert "train.steps=3: a setting of recipes, but only protocols" in capsys.readouterr().err


@pytest.mark.slow
def test_the_clip_demo_evaluates_both_runs_and_their_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["images.train=16", "images.validation=12", "train.steps=2", "train.batch_size=8", "train.workers=0"]
    page = demo.run("clip", small)
    assert page == Path("report/demo_clip/index.html") and "Weights of images" in page.read_text()
    teachers = {}
    for name in ("clip_mse", "clip_srw"):
        path = tmp_path / "runs" / "demo" / name / "evaluation" / "clip_zeroshot_demo.json"
        stored = json.loads(path.read_text())
        assert {row["subject"] for row in stored["rows"]} == {"student", "teacher"}
        quarters = {row["quartile"] for row in stored["rows"] if "quartile" in row and row["subject"] == "student"}
        assert quarters == {"q1", "q2", "q3", "q4"}
        teachers[name] = [image for image in stored["images"] if image["subject"] == "teacher"]
    assert teachers["clip_mse"] == teachers["clip_srw"] and len(teachers["clip_mse"]) == 12
    logs = [
        json.loads(line)
        for line in (tmp_path / "runs" / "demo" / "clip_srw" / "metrics.jsonl").read_text().splitlines()
    ]
    assert 0 < logs[0]["embedding/effective_sample_size"] < 1 < logs[0]["embedding/largest_weight"]


def test_an_unknown_demo_is_one_clear_line():
    with pytest.raises(UserError, match="demo dino: unknown demo.*Known: clip, sam"):
        demo.run("dino")
