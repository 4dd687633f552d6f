"""Checkpoints: the newest and the best remain, a damaged one is not used, and a full disk leaves those before whole."""

import json
import logging
import signal
from pathlib import Path

import pytest
import tiny
from test_cache_full_disk import Disk
from test_distill import Stop, rows, same, weights

from fmdistill import distill
from fmdistill.cli import main
from fmdistill.distill import checkpoint, tasks
from fmdistill.distill.checkpoint import AVERAGE, OPTIMIZER, TASK
from fmdistill.registry import UserError


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_newest_and_the_best_checkpoints_remain(cached):
    settings = ["train.checkpoint_every=2", "train.validate_every=1", "train.log_every=100"]
    worst = "validation/embedding/largest_weight"  # the smallest of these values is not among the last ones
    run = distill.run(tiny.load(cached, *settings, "train.keep=1", f"train.best={worst}"))
    values = {row["step"]: row[worst] for row in rows(run) if worst in row}
    best = min(values, key=lambda step: (values[step], step))
    assert list(values) == list(range(1, 13)) and best < 12
    assert checkpoint.steps(run) == [best, 12]
    assert json.loads((run / "checkpoints/best.json").read_text()) == {"step": best, worst: values[best]}
    run = distill.run(tiny.load(cached, *settings, "train.keep=3", "train.best=null", f"out={cached}/none"))
    assert names(run) == ["step-00000008", "step-00000010", "step-00000012"]


def test_a_best_value_that_no_validation_has_is_an_error_at_the_first_step(cached):
    with pytest.raises(
        UserError, match=r"train\.best=validation/los: no such value\. Did you mean 'validation/loss'\?"
    ):
        distill.run(tiny.load(cached, "train.best=validation/los"))
    with pytest.raises(UserError, match=r"train\.best=loss: expected a value of a validation, such as validation/loss"):
        tiny.load(cached, "train.best=loss")
    for wrong in ("train.keep=0", "train.max_skipped=0", "train.ema=1", "train.ema=0"):
        with pytest.raises(UserError, match=wrong.replace(".", r"\.")):
            tiny.load(cached, wrong)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_damaged_newest_checkpoint_is_moved_aside_and_the_one_before_is_used(cached, caplog):
    settings = ["train.ema=0.9", "train.validate_every=5"]
    run = distill.run(tiny.load(cached, *settings))
    expected, log = weights(run), rows(run)
    files = [(TASK, truncate), (OPTIMIZER, flip), (AVERAGE, Path.unlink), (TASK, lambda path: path.write_bytes(b""))]
    for name, damage in files:
        (run / "student.safetensors").unlink()
        assert checkpoint.steps(run)[-2:] == [10, 12]
        damage(run / f"checkpoints/step-00000012/{name}.safetensors")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            distill.run(tiny.load(cached, *settings))
        (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert f"{run}/checkpoints/step-00000012: this checkpoint is damaged (" in warning
        assert warning.endswith("; it is now damaged-step-00000012, and the one before is used")
        assert same(weights(run), expected) and rows(run) == log and "damaged-step-00000012" in names(run)


def test_a_run_whose_checkpoints_are_all_damaged_begins_again_when_it_is_asked_again(cached):
    recipe = tiny.load(cached)
    run = distill.run(recipe)
    expected, log = weights(run), rows(run)
    (run / "student.safetensors").unlink()
    (run / "checkpoints/.step-00000099.1.part").mkdir()
    (run / "checkpoints/step-00000016").mkdir()  # a folder without state.json is not a checkpoint
    for folder in (run / "checkpoints").glob("step-*/"):
        (folder / f"{TASK}.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(
        UserError, match=r"checkpoints: all 2 checkpoints are damaged, and are now called damaged-\.\.\."
    ):
        distill.run(recipe)
    assert same(weights(distill.run(recipe)), expected) and rows(run) == log


def test_a_checkpoint_of_another_task_is_not_called_damaged(cached):
    recipe = tiny.load(cached)
    run = distill.run(recipe)
    (run / "student.safetensors").unlink()
    (run / "recipe.yaml").unlink()
    with pytest.raises(
        UserError, match=r"step-00000012: does not fit this recipe \(.*delete the folder to use an earlier"
    ):
        distill.run(tiny.load(cached, "student.name=test_distill:Deaf"))
    assert checkpoint.steps(run) == [8, 12]


def test_a_checkpoint_from_before_checksums_is_read(cached):
    recipe = tiny.load(cached)
    run = distill.run(recipe)
    expected = weights(run)
    (run / "student.safetensors").unlink()
    path = run / "checkpoints/step-00000012/state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({"step": 12, "order": state["order"]}))
    assert same(weights(distill.run(recipe)), expected)


def test_a_stop_in_the_middle_of_an_accumulated_step_loses_no_step(cached, monkeypatch):
    settings = ["train.accumulate=2", "train.checkpoint_every=100", "train.validate_every=100"]
    whole = distill.run(tiny.load(cached, *settings, f"out={cached}/whole"))
    forward, calls = tasks.Distill.forward, []

    def stopping(self, batch):
        calls.append(1)
        if len(calls) == 2 * 7 + 2:  # the second part of step 8; the first has changed BatchNorm's statistics
            raise Stop(signal.SIGTERM)
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(tasks.Distill, "forward", stopping)
        with pytest.raises(Stop):
            distill.run(tiny.load(cached, *settings))
    assert checkpoint.steps(cached / "run") == [7]
    run = distill.run(tiny.load(cached, *settings))
    assert same(weights(run), weights(whole)) and rows(run) == rows(whole)


@pytest.mark.parametrize("kind", ["write", "replace"])
def test_a_disk_that_is_full_while_a_checkpoint_is_saved_leaves_the_ones_before(cached, capsys, kind):
    recipe, settings = str(tiny.write(cached)), ["train.validate_every=8", "train.ema=0.9", "train.steps=8"]
    whole = distill.run(tiny.load(cached, *settings, f"out={cached}/whole"))

    def run(out: Path, full: int | None = None) -> tuple[int, int, list[str]]:
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, kind, full)
            code = main(["distill", recipe, f"out={out}", *settings])
        lines = capsys.readouterr().err.splitlines()
        return code, disk.calls, [line for line in lines if line.startswith("fmdistill:")]

    code, calls, _ = run(cached / "undisturbed")
    assert code == 0
    # The last six are the files of step 8: task, optimizer, average and state; then best.json and the student.
    for number, kept in [(-6, [4]), (-4, [4]), (-3, [4]), (-1, [4, 8])][:: 1 if kind == "write" else 3]:
        out = cached / f"{kind}{number}"
        code, _, lines = run(out, calls + number)
        assert code == 2 and len(lines) == 1 and "No space left on device" in lines[0], lines
        assert str(out) in lines[0] and lines[0].endswith("the same command continues where it stopped")
        assert ("step-00000008" in lines[0]) == (kept == [4])
        assert not list((out / "checkpoints").glob(".*")) and checkpoint.steps(out) == kept
        for step in kept:
            checkpoint.read(out / f"checkpoints/step-{step:08d}")
        assert run(out)[0] == 0
        assert same(weights(out), weights(whole)) and rows(out) == rows(whole)
