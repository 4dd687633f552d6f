"""The training loop: exact resume, one order for any number of processes, and errors instead of silence."""

import dataclasses
import itertools
import json
import signal
from pathlib import Path

import kills
import pytest
import tiny
import torch
from safetensors.torch import load_file

from fmdistill import distill, stop
from fmdistill.distill import checkpoint, train
from fmdistill.distill.student import load_student
from fmdistill.registry import UserError


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student.safetensors")


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_run_writes_its_files_and_learns(cached):
    run = distill.run(tiny.load(cached))
    assert {p.name for p in run.iterdir()} == {"recipe.yaml", "metrics.jsonl", "student.safetensors", "checkpoints"}
    logged = rows(run)
    steps = [row for row in logged if "learning_rate" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    statistics = {"embedding/effective_sample_size", "embedding/largest_weight"}
    assert {"loss", "embedding", "grad_norm", *statistics} <= set(steps[0])
    assert [row["step"] for row in logged if "validation/loss" in row] == [6, 12]
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert 0 < steps[0]["embedding/effective_sample_size"] < 1 < steps[0]["embedding/largest_weight"]
    assert not load_student(run, trust=True).training


def test_the_same_recipe_trains_the_same_weights_and_another_seed_others(cached):
    first = weights(distill.run(tiny.load(cached)))
    again = weights(distill.run(tiny.load(cached, f"out={cached}/again", "train.workers=2")))
    other = weights(distill.run(tiny.load(cached, f"out={cached}/other", "seed=1")))
    assert same(first, again)
    assert not same(first, other)


class Killed(Exception):
    pass


def test_a_run_stopped_anywhere_resumes_to_the_same_weights_and_log(cached, monkeypatch):
    whole = distill.run(tiny.load(cached, f"out={cached}/whole"))
    original = torch.optim.AdamW.step
    for end in (1, 4, 5, 11):
        recipe = tiny.load(cached, f"out={cached}/stopped{end}")
        calls = []

        def step(self, *args, calls=calls, end=end, **kwargs):
            calls.append(1)
            if len(calls) == end + 1:
                raise Killed
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(Killed):
            distill.run(recipe)
        monkeypatch.setattr(torch.optim.AdamW, "step", original)
        run = distill.run(recipe)
        assert same(weights(whole), weights(run)) and rows(whole) == rows(run)


@pytest.mark.slow
def test_sigkill_at_twenty_moments_leaves_the_same_weights_and_log(cached):
    """With a moving average, and with steps that are skipped."""
    settings = ["train.steps=400", "train.checkpoint_every=10", "train.validate_every=40"]  # more than 20 kills allow
    settings += ["train.ema=0.9", "student.name=spoiled:NanImage"]
    whole = distill.run(tiny.load(cached, f"out={cached}/whole", *settings))
    run = cached / "killed"
    assert kills.distil(tiny.write(cached), run, settings) == 20
    assert same(weights(whole), weights(run)) and rows(whole) == rows(run)
    assert rows(run)[-2]["skipped"] > 100


def test_a_run_of_another_recipe_in_the_same_folder_raises(cached):
    distill.run(tiny.load(cached))
    with pytest.raises(
        UserError, match=r"optimizer\.lr is .*0\.003.* in the run and .*0\.1.* in the recipe.*out=FOLDER"
    ):
        distill.run(tiny.load(cached, "optimizer.lr=0.1"))
    with pytest.raises(UserError, match="already holds a run"):
        distill.run(tiny.load(cached), resume=False)
    assert distill.run(tiny.load(cached, "train.log_every=5")).name == "run"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.batch_size=100", "train.batch_size=4"),
        ("optimizer.lr=1e30", "optimizer.lr=0.001"),
        ("student.name=tinyvit_sam_mini", "student.name=tiny:Student"),
    ],
)
def test_an_error_s_advice_can_be_followed_in_the_same_folder(cached, wrong, right):
    with pytest.raises(UserError):
        distill.run(tiny.load(cached, wrong))
    run = distill.run(tiny.load(cached, right))  # nothing was trained, so the folder is still nobody's
    assert same(weights(run), weights(distill.run(tiny.load(cached, right, f"out={cached}/fresh"))))
    assert rows(run) == rows(cached / "fresh")


def test_a_folder_belongs_to_the_recipe_of_its_first_checkpoint(cached):
    with pytest.raises(Stop):
        stopped(cached, 5)
    for other in ("optimizer.lr=0.1", "train.batch_size=4", "cache.codec=int8"):
        with pytest.raises(UserError, match="holds a run of another recipe"):
            distill.run(tiny.load(cached, other))
    free = ["cache.max_failed=0.5", "cache.executor.name=accelerate", "train.workers=1", "title=x"]
    run = distill.run(tiny.load(cached, *free))
    assert same(weights(run), weights(distill.run(tiny.load(cached, f"out={cached}/whole"))))


Stop = stop.Stopped


def stopped(folder: Path, step: int, during: str = "step", *overrides: str) -> None:
    """Run the toy recipe with a stop requested at the moment `during` of optimizer step `step`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stop._request, "number", None)
        count = itertools.count(1)

        def request(call):
            def counted(*arguments, **named):
                if next(count) == step:
                    stop._request.number = signal.SIGTERM
                return call(*arguments, **named)

            return counted

        where = {"step": (train, "_row"), "validation": (train, "every")}[during]
        patch.setattr(*where, request(getattr(*where)))
        try:
            distill.run(tiny.load(folder, *overrides))
        finally:
            stop._request.number = None


@pytest.mark.parametrize("step", [1, 3, 4, 6, 12])
def test_a_requested_stop_saves_the_finished_step_and_the_run_resumes_from_it(cached, step):
    whole = distill.run(tiny.load(cached, f"out={cached}/whole"))
    if step == 12:  # the last one is followed by nothing that looks at a stop but its validation
        with pytest.raises(Stop):
            stopped(cached, step)
    else:
        with pytest.raises(Stop) as error:
            stopped(cached, step)
        assert error.value.number == signal.SIGTERM
    assert checkpoint.steps(cached / "run")[-1] == step
    run = distill.run(tiny.load(cached))
    assert same(weights(run), weights(whole)) and rows(run) == rows(whole)


def test_a_validation_that_a_stop_interrupted_is_repeated(cached):
    whole = distill.run(tiny.load(cached, f"out={cached}/whole"))
    for place in (1, 2):  # after steps 6 and 12
        with pytest.raises(Stop):
            stopped(cached, place if place == 1 else 2, "validation")
    run = distill.run(tiny.load(cached))
    assert same(weights(run), weights(whole)) and rows(run) == rows(whole)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=100", "there are only 24 training images"),
        ("train.batch_size=7 train.accumulate=2", r"train\.batch_size=7: not divisible"),
        ("train.steps=null", "set exactly one"),
        ("train.epochs=1 train.steps=3", "set exactly one"),
        ("train.steps=0", "expected more than 0"),
        ("train.window=0", "expected at least 1"),
        ("train.clip=0", "above 0, or null"),
        ("seed=-1", "expected 0 or more"),
        ("student.name=tinyvit_sam_mini", "makes 128 channels at 256 px, but the cache has 32 channels at 64 px"),
        ("objective.embedding.output=logits", "output=logits: the student has no such output"),
        ("objective.embedding.weighting.temperature=0", "expected a number above 0"),
        ("optimizer.lr=1e30", "10 steps in a row were skipped"),
    ],
)
def test_a_setting_that_cannot_work_is_one_clear_line(cached, override, message):
    with pytest.raises(UserError, match=message):
        distill.run(tiny.load(cached, *override.split()))


class Deaf(tiny.Student):
    """A student with a parameter that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.ones(3))


class Perfect(tiny.Student):
    """A student cut off from its own parameters."""

    def forward(self, image):
        out = super().forward(image)["embedding"]
        return {"embedding": 0 * out}


def test_no_gradient_at_step_one_is_an_error(cached):
    with pytest.raises(UserError, match=r"no gradient reaches 1 parameters, student\.unused first"):
        distill.run(tiny.load(cached, "student.name=test_distill:Deaf"))
    with pytest.raises(UserError, match="no gradient reaches any parameter"):
        distill.run(tiny.load(cached, "student.name=test_distill:Perfect", f"out={cached}/perfect"))


def test_accumulation_follows_the_same_batches(cached):
    """Without BatchNorm's batch statistics, two micro-batches have the gradient of the whole batch."""
    plain = distill.run(tiny.load(cached, "student.name=test_distill:Still", f"out={cached}/plain"))
    halves = distill.run(
        tiny.load(cached, "student.name=test_distill:Still", "train.accumulate=2", f"out={cached}/halves")
    )
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(halves)[name], value, rtol=2e-4, atol=2e-5)


class Still(tiny.Student):
    """The toy student with its BatchNorm frozen."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.net[1].eval()
        return self


def test_epochs_replace_inherited_steps(cached):
    run = distill.run(tiny.load(cached, "train.epochs=2"))
    assert rows(run)[-1]["step"] == 2 * 24 // 8


def test_a_resume_on_other_images_raises(cached):
    recipe = tiny.load(cached)
    (distill.run(recipe) / "student.safetensors").unlink()
    fewer = tiny.load(cached, "images.limit=16")
    (Path(recipe.out) / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="the training images have changed since"):
        distill.run(fewer)


def test_a_run_whose_images_have_moved_is_the_same_run(cached):
    recipe = tiny.load(cached)
    run = distill.run(recipe)
    moved = distill.run(dataclasses.replace(recipe, title="moved"))
    assert moved == run and "title: moved" in (run / "recipe.yaml").read_text()
