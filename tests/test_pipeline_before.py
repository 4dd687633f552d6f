"""Tests that errors are raised as early as possible: before a teacher is built or an image is cached."""

import os
import re
from pathlib import Path

import pytest
import tiny
import torch
import toy_digits

from fmdistill import cache, export, pipeline, recipe, report, teachers
from fmdistill.cli import main
from fmdistill.distill import tasks
from fmdistill.pipeline import compare
from fmdistill.registry import UserError


@pytest.fixture(autouse=True)
def no_teacher(monkeypatch):
    monkeypatch.setattr(teachers, "build", lambda settings: pytest.fail("a teacher is built"))


def error_line(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must end with exit code 2 and an error in one error_line; return the error_line."""
    assert main([str(argument) for argument in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("fmdistill: error: ") and len([x for x in lines if "error:" in x]) == 1
    return lines[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train.batch_size=100", r"train\.batch_size=100: there are only 24 training images"),
        ("train.accumulate=3", r"train\.batch_size=8: not divisible by 1 processes x train\.accumulate=3"),
        ("schedule.horizon=5", r"schedule\.horizon=5: the run has 12 steps"),
        ("schedule.horizon=5 train.epochs=2", r"schedule\.horizon=5: the run has 6 steps"),
        ("protocols=[eval/clip_retrieval.yaml]", "image 'chelsea-0000' has no caption"),
        ("protocols=[eval/clip_retrieval.yaml] teacher.name=sam_mini", "sam_mini: has no text tower"),
        ("protocols=[eval/imagenet_top1.yaml] student.name=tinyvit_sam_mini", "top1: needs a classifier"),
    ],
)
def test_a_run_that_cannot_train_or_be_evaluated_raises(tmp_path, capsys, settings, message):
    assert re.search(message, error_line(capsys, "run", tiny.write(tmp_path), *settings.split()))
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_a_batch_that_several_processes_cannot_share_raises(tmp_path, capsys, monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert "not divisible by 3 processes" in error_line(capsys, "run", tiny.write(tmp_path))


def test_a_folder_that_cannot_be_written_raises(tmp_path, capsys):
    path, file = tiny.write(tmp_path), tmp_path / "file"
    file.touch()
    for argv in (
        ("run", path, f"out={file}/run"),
        ("distill", path, f"out={file}/run"),
        ("compare", path, tmp_path / "other.yaml", f"out={file}/run"),
        ("bench", path, f"out={file}/run"),
    ):
        (tmp_path / "other.yaml").write_text(f"extends: {path}\nout: other\noptimizer: {{lr: 0.1}}\n")
        assert "file" in error_line(capsys, *argv)
    with pytest.raises(OSError, match="the report cannot be written"):
        report.run([str(tmp_path / "none")], str(file))
    with pytest.raises(OSError, match="the export cannot be written"):
        export.run(tmp_path / "none", "half", file / "student.safetensors")
    with pytest.raises(
        UserError, match=r"is a folder, but mobilesam is one file; name the file, such as .*/mobile_sam\.pt"
    ):
        export.run(tmp_path / "none", "mobilesam", tmp_path)


def test_compare_refuses_several_processes_and_a_table_that_cannot_be_written(tmp_path, monkeypatch):
    first = tiny.write(tmp_path)
    (tmp_path / "other.yaml").write_text(f"extends: {first}\nout: {tmp_path}/file/other\noptimizer: {{lr: 0.1}}\n")
    (tmp_path / "file").touch()
    both = [str(first), str(tmp_path / "other.yaml")]
    with pytest.raises(OSError, match="cannot be written"):
        compare.run(both, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="compare: .*without a launcher"):
        compare.run(both, 2)


def test_a_recipe_that_only_caches_is_cached_with_a_warning_about_its_training(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    assert main(["cache", str(tiny.write(tmp_path)), "images.limit=2"]) == 0
    shown = capsys.readouterr().err
    assert "training by this recipe will fail: train.batch_size=8: there are only 2" in shown
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2


def test_check_takes_a_folder_of_recipes_and_a_run(tmp_path, capsys):
    path = tiny.write(tmp_path)
    assert pipeline.check_files([str(tmp_path)]) == [str(path)]
    recipe.save(recipe.load(path, ["student.name=tinyvit_sam_mini", "teacher.name=sam_mini"]), tmp_path / "run")
    assert pipeline.check_files([str(tmp_path / "run")]) == [f"{tmp_path}/run/recipe.yaml"]
    (tmp_path / "empty").mkdir()
    assert "contains no recipe" in error_line(capsys, "check", tmp_path / "empty")


def test_a_seed_starts_the_same_student_with_a_live_teacher_and_with_its_cache(tmp_path, monkeypatch):
    monkeypatch.undo()
    settings = toy_digits.trained(tmp_path)
    cache.run(settings)
    live = recipe.load(tmp_path / "student.yaml", ["teacher.live=true", "cache=null"])
    first, second = (tasks.build(each).task.state_dict() for each in (settings, live))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_home_folder_in_a_setting_is_expanded(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["cache", str(tiny.write(tmp_path)), "cache.root=~/own", "images.limit=2"]) == 0
    assert (tmp_path / "own/manifest.json").is_file() and not Path("~").exists() and "~" not in os.listdir()
