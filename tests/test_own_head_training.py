"""Training with a mask decoder of the student's own: who trains it, what it starts from, resuming, optimizers."""

from pathlib import Path

import pytest
import test_distill_refine as second_stage
import test_own_head as own_heads
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from fmdistill import distill
from fmdistill import recipe as recipes
from fmdistill.cache.batch import fill
from fmdistill.distill import refine, tasks
from fmdistill.distill import student as students
from fmdistill.distill.optim import adamw, muon
from fmdistill.distill.student import own_head
from fmdistill.recipe import Recipe

SHORT = ("train.steps=3", "train.checkpoint_every=2", "train.validate_every=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_cache) -> Path:
    """A folder with the toy cache and a run `own` with a random mask decoder of its own."""
    path = tmp_path_factory.mktemp("own_head_training")
    (path / "cache").symlink_to(toy_cache)
    own_heads.write_run(path, "own", True)
    return path


def state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / students.WEIGHTS)


def of_head(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if name.startswith("prompt_head.")}


def plain(folder: Path, *overrides: str) -> Recipe:
    """The toy recipe of task distill."""
    return recipes.load(tiny.write(folder), ["student.name=test_own_head:tinyvit", *SHORT, *overrides])


@pytest.mark.parametrize("start", ["own", f"own/{students.WEIGHTS}"])
@pytest.mark.parametrize("task", ["distill", "refine"])
def test_a_run_that_starts_from_one_with_its_own_head_keeps_it_as_it_is(folder, tmp_path, task, start):
    settings = (f"out={tmp_path}/run", f"student.pretrained={folder}/{start}")
    load = plain if task == "distill" else second_stage.load
    name = "student.name=test_own_head:tinyvit"
    recipe = load(folder, name, *SHORT, *settings)
    assert not any(p.requires_grad for p in own_head(tasks.build(recipe).student).parameters())
    run = distill.run(recipe)
    before, after = state(folder / "own"), state(run)
    assert before.keys() == after.keys() and of_head(before)
    assert all(torch.equal(after[name], value) for name, value in of_head(before).items())
    assert any(not torch.equal(after[name], value) for name, value in before.items() if name not in of_head(before))
    assert own_heads.same_head(
        own_head(students.load_student(run, trust=True)), own_head(students.load_student(folder / "own", trust=True))
    )
    job, task_again = tasks.open_task(run, trust=True)
    assert own_heads.same_head(own_head(job.student), own_head(students.load_student(run, trust=True)))
    assert torch.isfinite(task_again(job.complete(fill(job.train, [(0, 0, 0)])))["loss"])


def test_a_frozen_own_head_makes_the_masks_of_the_second_stage(folder):
    recipe = second_stage.load(
        folder, "student.name=test_own_head:tinyvit", f"student.pretrained={folder}/own", "task.rounds=0"
    )
    job, batch = second_stage.job_and_batch(recipe)
    student = students.load_student(folder / "own", trust=True)
    with torch.no_grad():
        seen = job.task.see(batch)
        answers = seen.outputs["student.embedding"]
    other = tasks.build(second_stage.load(folder, "student.name=test_own_head:tinyvit", "task.rounds=0"))
    other.student.load_state_dict({n: v for n, v in student.state_dict().items() if not n.startswith("prompt_head.")})
    with torch.no_grad():
        by_teacher = other.task.eval().see(batch)
    torch.testing.assert_close(by_teacher.outputs["student.embedding"], answers)
    torch.testing.assert_close(by_teacher.teacher("masks"), seen.teacher("masks"))
    assert (by_teacher.student("masks") - seen.student("masks")).abs().max() > 0.1
    x, y, box, _ = batch["draws"][0, 0].tolist()
    if box >= 0.5:
        h, w = batch["sizes"][0].tolist()
        with torch.no_grad():
            logits, _ = own_head(student).decode_all(
                answers[0], torch.tensor([[[float(int(x * w)), float(int(y * h))]]]), torch.ones(1, 1)
            )
        torch.testing.assert_close(seen.student("masks")[0, :4], logits[0], rtol=1e-3, atol=1e-3)


def trained(folder: Path, *overrides: str) -> Recipe:
    name = "student.name=test_own_head:tinyvit"
    return second_stage.load(folder, name, "task.head=trained", "task.prompts=2", *overrides)


def learning(job) -> dict[str, nn.Parameter]:
    return {n: p for n, p in job.task.named_parameters() if n.startswith("student.prompt_head.") and p.requires_grad}


@pytest.mark.parametrize("kind", ["layer_decay", "muon", "muon with convolutions"])
def test_optimizers_train_the_head_at_the_full_rate(folder, kind):
    recipe = trained(folder)
    job, batch = second_stage.job_and_batch(recipe)
    model = job.task.train()
    if kind == "layer_decay":
        made = adamw(model, 1e-3, layer_decay=0.5)
    else:
        made = muon(model, 1e-3, convolutions="with" in kind)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    head = learning(job)
    assert head and all(rates[id(p)] == 1e-3 for p in head.values())
    frozen = [p for p in own_head(job.student).parameters() if not p.requires_grad]
    assert frozen and not any(id(p) in rates for p in frozen)
    assert (min(rates.values()) < 1e-4) is (kind == "layer_decay")
    before = {name: p.detach().clone() for name, p in head.items()}
    model(batch)["loss"].backward()
    assert all(p.grad is not None for p in head.values())  # or several processes could not train it
    made.step()
    moved = [name for name, p in head.items() if not torch.equal(p, before[name])]
    assert len(moved) > 0.9 * len(head)


TERMS = {
    "masks": "{output: masks, distance: {name: mask}, weighting: {name: uniform}}",
    "patches": "{output: mask_patches, distance: {name: mask_patches}, weighting: {name: uniform}}",
    "tokens": "{output: mask_tokens, distance: {name: mse}, weighting: {name: uniform}}",
    "iou": "{output: mask_iou, distance: {name: mse}, weighting: {name: uniform}}",
}


@pytest.mark.parametrize("masks", ["all", "best"])
@pytest.mark.parametrize("term", TERMS)
def test_every_trained_parameter_has_a_gradient_or_several_processes_could_not_train(folder, term, masks):
    objective = f"objective={{a: {TERMS[term]}}}"
    job, batch = second_stage.job_and_batch(
        trained(folder, "student.name=tiny:Student", objective, f"task.masks={masks}")
    )
    job.task.train()(batch)["loss"].backward()
    without = [name for name, p in job.task.named_parameters() if p.requires_grad and p.grad is None]
    assert not without and learning(job)
    unused = [name for name, p in job.task.named_parameters() if not p.requires_grad and "mask_decoder" in name]
    assert any("iou_prediction_head" in name for name in unused) is (term != "iou")
    assert any("output_upscaling" in name for name in unused) is (term in ("tokens", "iou"))


class Killed(Exception):
    pass


@pytest.mark.parametrize("ema", ["null", "0.9"])
def test_a_stopped_run_with_a_trained_head_resumes_to_the_same_weights(folder, tmp_path, monkeypatch, ema):
    settings = ("train.steps=4", "train.checkpoint_every=2", "train.validate_every=4", "student.name=tiny:Student")
    average = f"train.ema={ema}"
    whole = distill.run(trained(folder, *settings, average, f"out={tmp_path}/whole"))
    recipe, original = trained(folder, *settings, average, f"out={tmp_path}/stopped"), torch.optim.AdamW.step
    calls = []

    def step(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return original(self, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(Killed):
            distill.run(recipe)
    run = distill.run(recipe)
    assert (run / students.WEIGHTS).read_bytes() == (whole / students.WEIGHTS).read_bytes()
    assert (run / students.HEAD).read_bytes() == (whole / students.HEAD).read_bytes()
    teacher = own_heads.teacher_head(recipe).state_dict()
    learned = of_head(state(run))
    assert any(not torch.equal(value, teacher[name.removeprefix("prompt_head.")]) for name, value in learned.items())
    if ema != "null":
        other = state(distill.run(trained(folder, *settings, f"out={tmp_path}/plain")))
        assert any(not torch.equal(value, other[name]) for name, value in learned.items())


def test_the_teachers_head_is_not_trained_with_the_student_s(folder):
    job, batch = second_stage.job_and_batch(trained(folder))
    assert isinstance(job.task, refine.Refine)
    teacher = job.task._teacher_head[0]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    made = adamw(job.task.train(), 1e-2)
    job.task(batch)["loss"].backward()
    made.step()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any("_teacher_head" in name for name in job.task.state_dict())
