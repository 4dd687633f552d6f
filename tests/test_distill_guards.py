"""Steps that are not finite are skipped, a student that does not move is an error, and the loop waits for no GPU."""

import logging
import traceback

import pytest
import spoiled
import tiny
import torch
from test_distill import Stop, rows, same, stopped, weights
from torch.utils._python_dispatch import TorchDispatchMode

from fmdistill import distill
from fmdistill.cache.batch import fill
from fmdistill.cache.order import Batches
from fmdistill.distill import guards, optim, tasks, train
from fmdistill.distill.engine import Delayed, Engine
from fmdistill.distill.guards import FiniteSteps
from fmdistill.distill.state import TrainingState
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, bind

DECAY = 0.8


def without_the_steps(
    recipe: Recipe, key: str, decay: float | None = None
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Train in a plain loop that leaves out the steps whose batch has `key`; return the weights and these steps.

    With `decay` the weights are their moving average, by its formula.
    """
    job = tasks.build(recipe)
    task = job.task.train()
    optimizer = bind(recipe.optimizer, optim.OPTIMIZERS, "optimizer", context=("model",))(task)
    schedule, steps, left_out = optim.CosineSchedule(warmup=0.1), recipe.train.steps, []
    averages = [p.detach().clone() for p in task.parameters()]
    plan = Batches(tuple(job.train.counts), recipe.train.batch_size, recipe.seed, recipe.train.window)
    for step, places in enumerate(plan.between(0, steps)):
        batch = fill(job.train, places)
        if key in batch["keys"]:
            left_out.append(step + 1)
            continue
        optimizer.zero_grad()
        task({**job.complete(batch), "epoch": (step + 1) / plan.steps_per_epoch})["loss"].backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.003 * schedule(step, steps)
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(averages, task.parameters(), strict=True):
                d = min(decay or 0, (2 + step) / (11 + step))
                average.lerp_(parameter, 1 - d)
    if decay is not None:
        for average, parameter in zip(averages, task.parameters(), strict=True):
            parameter.data = average
    return job.student.state_dict(), left_out


@pytest.mark.parametrize("student", ["NanImage", "NanGradient"])
def test_a_step_that_is_not_finite_leaves_no_trace_but_its_count(cached, student, caplog):
    recipe = tiny.load(cached, f"student.name=spoiled:{student}", f"train.ema={DECAY}")
    with caplog.at_level(logging.WARNING):
        run = distill.run(recipe)
    expected, left_out = without_the_steps(recipe, spoiled.KEY, DECAY)
    assert len(left_out) == 4 and same(weights(run), expected)  # BatchNorm's statistics too
    logged = [row for row in rows(run) if "learning_rate" in row]
    assert [row["skipped"] for row in logged] == [sum(step <= row["step"] for step in left_out) for row in logged]
    assert [row["step"] for row in logged if "grad_norm" not in row] == left_out
    assert [row["step"] for row in logged if "loss" not in row] == (left_out if student == "NanImage" else [])
    warnings = [record.getMessage() for record in caplog.records if "is skipped" in record.message]
    reason = "the loss is nan" if student == "NanImage" else "the gradient is not finite"
    assert [text.split(":")[0] for text in warnings] == [f"step {step} is skipped" for step in left_out]
    assert all(reason in text for text in warnings)


def test_skipped_steps_in_a_row_end_the_run_and_name_the_images(cached):
    recipe = tiny.load(cached, "student.name=spoiled:NanImages", "train.max_skipped=3", "train.checkpoint_every=1")
    job, plan = tasks.build(recipe), Batches((8, 8, 8), 8, recipe.seed, recipe.train.window)
    keys = fill(job.train, list(plan.between(0, 3))[2])["keys"]
    with pytest.raises(UserError, match=r"step 3: 3 steps in a row were skipped \(train.max_skipped=3\)") as error:
        distill.run(recipe)
    assert f"since the loss is nan for images {', '.join(keys[:4])} and 4 more; lower optimizer.lr" in str(error.value)
    assert not (cached / "run/checkpoints").exists()  # it would replace sound ones
    with pytest.raises(UserError, match="all 2 steps were skipped"):
        distill.run(tiny.load(cached, "student.name=spoiled:NanImages", "train.steps=2"))


def test_accumulated_parts_are_skipped_together_and_the_part_is_named(cached, caplog):
    recipe = tiny.load(cached, "student.name=spoiled:NanImageStill", "train.accumulate=4")
    with caplog.at_level(logging.WARNING):
        run = distill.run(recipe)
    _, left_out = without_the_steps(recipe, spoiled.KEY)
    assert rows(run)[-2]["skipped"] == len(left_out) == 4
    warnings = [record.getMessage() for record in caplog.records if "is skipped" in record.message]
    assert len(warnings) == 4 and all(
        spoiled.KEY in text and text.count(",") == 1 for text in warnings
    )  # of two images


class Waits(TorchDispatchMode):
    """Notes where a value of a tensor is read, which waits for a GPU; those that were copied earlier do not count."""

    def __init__(self, copies: set[int]) -> None:
        super().__init__()
        self.copies, self.places = copies, []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if "_local_scalar_dense" in str(function) and arguments[0].data_ptr() not in self.copies:
            self.places.append("".join(traceback.format_stack(limit=12)))
        return function(*arguments, **(named or {}))


def test_on_the_path_of_a_gpu_a_step_waits_for_nothing_and_skips_the_same(cached, monkeypatch):
    """A fused optimizer skips by itself on a CPU too, which stands for the GPU here."""
    settings = ["student.name=spoiled:NanImage", "train.ema=0.8", "train.log_every=5", "train.checkpoint_every=7"]
    monkeypatch.setattr(optim, "_fused", lambda trained: True)
    with monkeypatch.context() as patch:
        patch.setattr(FiniteSteps, "fused", property(lambda self: False, lambda self, value: None), raising=False)
        at_once = distill.run(tiny.load(cached, *settings, f"out={cached}/at_once"))

    copies, waits, kept = set(), [], []
    exchange = Delayed.exchange

    def noted(self, value):
        before = exchange(self, value)
        copies.add(self._pending[0].data_ptr())
        kept.append(self._pending[0])
        return before

    def watched(original):
        def call(*arguments, **named):
            with Waits(copies) as mode:
                result = original(*arguments, **named)
            waits.append(mode.places)
            return result

        return call

    monkeypatch.setattr(Delayed, "exchange", noted)
    monkeypatch.setattr(TrainingState, "update", watched(TrainingState.update))
    monkeypatch.setattr(train, "_backward", watched(train._backward))
    late = distill.run(tiny.load(cached, *settings, f"out={cached}/late"))
    # The first step waits, since it makes the optimizer's state and checks the objective, and so does the one after a
    # skipped step, to name its images (the skipped step 6 was followed by a validation, which does it).
    assert len(waits) == 24 and [number for number, places in enumerate(waits) if places] == [0, 1, 7, 17, 23]
    assert len(kept) == 11
    assert same(weights(late), weights(at_once)) and rows(late) == rows(at_once)
    assert rows(late)[-2]["skipped"] == 4


def test_several_gpus_stop_together_one_step_after_the_request(tmp_path, monkeypatch):
    engine = Engine(tiny.load(tmp_path).train)
    monkeypatch.setattr(Engine, "_several_gpus", True)
    others = [0.0, 1.0, 0.0]  # another process is asked to stop before its second step
    monkeypatch.setattr(engine.accelerator, "reduce", lambda own, how: own + others.pop(0))
    engine.check_stop()
    engine.check_stop()
    with pytest.raises(Stop):
        engine.check_stop()
    delayed = Delayed()
    values = [delayed.exchange(torch.tensor(number)) for number in (1, 2, 3)]
    assert values == [None, torch.tensor(1), torch.tensor(2)] and (delayed.last(), delayed.last()) == (3, None)


def test_a_student_that_does_not_move_is_an_error(cached, monkeypatch):
    assert guards.MOVED_BY == 100
    monkeypatch.setattr(guards, "MOVED_BY", 4)
    still = ["optimizer.lr=1e-30", "schedule.warmup=0"]
    with pytest.raises(UserError, match=r"step 4: the student has not moved: .* relative \d+e-\d\d\.") as error:
        distill.run(tiny.load(cached, *still))
    assert "learning rate so far was 1e-30, 0 steps were skipped, and 0 of 6 tensors" in str(error.value)
    assert "raise optimizer.lr, shorten schedule.warmup, or freeze fewer" in str(error.value)
    with pytest.raises(Stop):
        stopped(cached, 2, "step", *still, f"out={cached}/stopped")
    with pytest.raises(UserError, match="step 4: the student has not moved"):
        distill.run(tiny.load(cached, *still, f"out={cached}/stopped"))
    assert distill.run(tiny.load(cached, *still, "train.steps=3", f"out={cached}/short")).is_dir()
    assert distill.run(tiny.load(cached, "train.steps=5", f"out={cached}/moving")).is_dir()
