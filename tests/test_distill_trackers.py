"""The log is shown by accelerate's trackers where a recipe names them, and a missing package is one line."""

import sys

import pytest
import tiny
from accelerate import tracking
from test_distill import rows

from fmdistill import distill, pipeline
from fmdistill.registry import UserError


class Tracker(tracking.GeneralTracker):
    """Notes what it is given."""

    name, requires_logging_directory, tracker = "noted", False, None
    built: list["Tracker"] = []

    def __init__(self, run_name, **arguments):
        self.run_name, self.arguments, self.rows, self.state = run_name, arguments, [], ["built"]
        Tracker.built.append(self)

    def start(self):
        self.state.append("started")

    def log(self, values, step=None):
        self.rows.append({"step": step, **values})

    def finish(self):
        self.state.append("finished")


def test_a_missing_package_is_one_line_before_any_work(cached, monkeypatch):
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        recipe = tiny.load(cached, f"train.trackers=[{name}]")
        line = rf"train\.trackers=\[{name}\]: {name} is missing; pip install 'fmdistill\[trackers\]'"
        for call in (pipeline.check, distill.run):
            with pytest.raises(UserError, match=line):
                call(recipe)
    with pytest.raises(UserError, match=r"Known: tensorboard, wandb"):
        tiny.load(cached, "train.trackers=[mlflow]")


def test_the_trackers_get_every_row_of_the_log_and_are_closed(cached, monkeypatch):
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, sys)
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Tracker)
    monkeypatch.setattr(Tracker, "built", [])
    recipe = tiny.load(cached, "train.trackers=[tensorboard,wandb]", "train.steps=8")
    run = distill.run(recipe)
    board, wandb = Tracker.built
    for tracker in Tracker.built:
        assert tracker.state == ["built", "started", "finished"]
        shown = [{k: v for k, v in row.items() if k != "images_per_second"} for row in tracker.rows]
        assert shown == rows(run) and "images_per_second" in tracker.rows[0]
    assert (board.run_name, board.arguments) == ("tensorboard", {"logging_dir": str(run), "purge_step": 1})
    assert wandb.run_name == "fmdistill" and wandb.arguments["config"]["train.steps"] == 8
    (run / "student.safetensors").unlink()
    distill.run(recipe)
    board, again = Tracker.built[2:]
    assert board.arguments["purge_step"] == 9 and board.rows == []
    assert again.arguments["id"] == wandb.arguments["id"] and again.arguments["resume"] == "allow"


def test_a_tracker_that_does_not_start_is_one_line(cached, monkeypatch):
    def start(self):
        raise RuntimeError("No API key configured.\nUse `wandb login`")

    monkeypatch.setitem(sys.modules, "wandb", sys)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    monkeypatch.setattr(Tracker, "start", start)
    with pytest.raises(UserError, match=r"wandb did not start \(No API key configured. Use `wandb login`\); correct"):
        distill.run(tiny.load(cached, "train.trackers=[wandb]"))


def test_tensorboard_s_files_have_the_losses(cached):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = distill.run(tiny.load(cached, "train.trackers=[tensorboard]", "train.steps=3"))
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in rows(run) if "loss" in row]
