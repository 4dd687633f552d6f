"""The moving average of the weights: its formula, what it is used for, and that it is resumed exactly."""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_distill import Stop, rows, same, stopped, weights

from fmdistill import distill
from fmdistill.distill import checkpoint, student, tasks
from fmdistill.distill.checkpoint import AVERAGE, TASK
from fmdistill.distill.ema import MovingAverage
from fmdistill.distill.engine import Engine
from fmdistill.distill.train import validator


def test_the_average_follows_its_formula_and_buffers_are_the_network_s_own():
    torch.manual_seed(0)
    task = tiny.Student()
    task.net[3].bias.requires_grad_(False)
    average, expected = MovingAverage(task, 0.5), {name: p.detach().clone() for name, p in task.named_parameters()}
    for step in range(1, 9):
        with torch.no_grad():
            for parameter in task.parameters():
                parameter.add_(torch.randn_like(parameter))
            task.net[1].running_mean.add_(1.0)
        average.update(step, torch.tensor(step != 3))  # the third was skipped
        decay = min(0.5, (1 + step) / (10 + step))
        assert (decay < 0.5) == (step < 8)
        for name, parameter in task.named_parameters():
            if step != 3 and name != "net.3.bias":
                expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    expected["net.3.bias"] = task.net[3].bias  # is not trained
    state = average.state_dict()
    assert state.keys() == task.state_dict().keys()
    assert torch.equal(state["net.1.running_mean"], torch.full((16,), 8.0))
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6)
    own = {name: value.clone() for name, value in task.state_dict().items()}
    with average.in_use():
        assert same(dict(task.state_dict()), state) and not same(own, state)
    assert same(dict(task.state_dict()), own)


def test_the_run_s_student_is_the_average_and_validations_judge_it(cached):
    recipe = tiny.load(cached, "train.ema=0.9")
    run = distill.run(recipe)
    plain = distill.run(tiny.load(cached, f"out={cached}/plain"))
    newest = run / f"checkpoints/step-{checkpoint.steps(run)[-1]:08d}"
    task, average = (load_file(newest / f"{name}.safetensors") for name in (TASK, AVERAGE))
    assert same({name.removeprefix("student."): value for name, value in average.items()}, weights(run))
    assert same({name.removeprefix("student."): value for name, value in task.items()}, weights(plain))
    assert checkpoint.learned(run) == newest / "average.safetensors"
    begun = student.build({"name": "tiny:Student", "pretrained": str(newest / "average.safetensors")})
    assert same(begun.state_dict(), weights(run))
    job, engine = tasks.build(recipe), Engine(recipe.train)
    job.task.load_state_dict(average)
    validated = validator(job.validation, engine, job.complete)(job.task)
    logged = {name: value for name, value in rows(run)[-1].items() if name.startswith("validation/")}
    assert validated == logged and logged["validation/loss"] != rows(plain)[-1]["validation/loss"]
    losses = [[row["loss"] for row in rows(path) if "loss" in row] for path in (run, plain)]
    assert losses[0] == losses[1]  # training itself is the same


@pytest.mark.parametrize("step", [1, 6])
def test_a_stopped_run_has_the_undisturbed_average(cached, step):
    whole = distill.run(tiny.load(cached, "train.ema=0.9", f"out={cached}/whole"))
    with pytest.raises(Stop):
        stopped(cached, step, "step", "train.ema=0.9")
    run = distill.run(tiny.load(cached, "train.ema=0.9"))
    assert same(weights(run), weights(whole)) and rows(run) == rows(whole)


def test_a_stop_during_a_validation_saves_the_weights_themselves(cached):
    whole = distill.run(tiny.load(cached, "train.ema=0.9", f"out={cached}/whole"))
    with pytest.raises(Stop):
        stopped(cached, 1, "validation", "train.ema=0.9")
    run = distill.run(tiny.load(cached, "train.ema=0.9"))
    assert same(weights(run), weights(whole)) and rows(run) == rows(whole)
