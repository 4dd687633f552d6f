"""Schedules and mixtures of weightings: literal formulas, what is refused, and the training loop's progress."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from test_distill import Killed, rows, same

from fmdistill import distill, pipeline
from fmdistill import recipe as recipes
from fmdistill.distill import objective
from fmdistill.distill.joined import SeveralTeachers
from fmdistill.distill.objective import Objective
from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.blend import Blend
from fmdistill.distill.weightings.srw import SRW
from fmdistill.pipeline import variants
from fmdistill.registry import UserError

# Legend: B images, N patches per image.

SHAPE = (6, 4, 4)
BLENDS = [{"until": 0.5}, {"until": 0.5, "fade": True}, {"mix": 0.3}, {"until": 0.8, "fade": True, "mix": 0.25}]


def batch(progress: float | None, seed: int = 0) -> Seen:
    """Return three images' outputs, of which the first has two rows of padding, at some time of a run."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(3, *SHAPE, generator=generator) + 0.5 for _ in range(2))
    valid = torch.ones(3, 16, dtype=torch.bool)
    valid[0, 8:] = False
    names = {"student.embedding": student.requires_grad_(), "sam.embedding": teacher}
    return Seen(names, keys=["a", "b", "c"], grids={"sam.embedding": valid}, progress=progress)


def term(name: str = "srw", **settings) -> Objective:
    weighting = {"name": name, **({"temperature": 0.2} if name == "srw" else {}), **settings}
    return Objective({"a": {"distance": {"name": "mse"}, "weighting": weighting, "padding": "exclude"}})


def literal_share(progress: float | None, until: float | None = None, fade: bool = False, mix: float = 0.0) -> float:
    """The share of uniform weights, by cases."""
    if progress is None or until is None:
        return mix
    if progress >= until:
        return 1.0
    return mix + (1 - mix) * progress / until if fade else mix


@pytest.mark.parametrize("settings", BLENDS)
@pytest.mark.parametrize("progress", [None, 0.0, 0.3, 0.4999, 0.5, 0.8, 0.99])
def test_the_weights_are_the_literal_mixture_of_the_weighting_and_uniform_ones(settings, progress):
    seen = batch(progress)
    _, weight, view = term(**settings).terms["a"].measure(seen)
    own = SRW(0.2)(torch.zeros(3, 16), view).double().numpy()
    share = literal_share(progress, **settings)
    expected = np.where(view.valid.numpy(), (1 - share) * own + share, 0)
    np.testing.assert_allclose(weight, expected, rtol=1e-5)
    np.testing.assert_allclose(weight.sum(1) / view.valid.sum(1), np.ones(3), rtol=1e-5)
    assert weight.shape == (3, 16) and not weight.requires_grad
    assert weight[view.valid].min() >= settings.get("mix", 0) * 0.9999


def test_at_the_end_of_the_schedule_the_loss_is_exactly_that_of_uniform_weights():
    scheduled, uniform = term(until=0.5), term("uniform")
    for progress in (0.5, 0.75):
        assert scheduled(batch(progress))[0]["a"] == uniform(batch(progress))[0]["a"]
    assert scheduled(batch(0.4))[0]["a"] == term()(batch(0.4))[0]["a"] != uniform(batch(0.4))[0]["a"]


@pytest.mark.parametrize("settings", BLENDS[:2])
def test_outside_of_training_a_weighting_applies_without_its_schedule(settings):
    assert term(**settings)(batch(None))[0]["a"] == term()(batch(None))[0]["a"]


def test_a_mixture_of_vectors_over_the_whole_step_has_mean_one_in_any_part():
    whole = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)) + 0.5
    settings = {"name": "srw", "temperature": 0.05, "mix": 0.4}
    mixed = Objective({"a": {"distance": {"name": "mse"}, "weighting": settings}}).terms["a"]
    own = SRW(0.05)(torch.zeros(12), Seen({"clip.embedding": whole}, None, "embedding", {"clip.embedding": whole}))
    parts = []
    for part in whole.split(4):
        outputs = {"student.embedding": torch.zeros(4, 8), "clip.embedding": part}
        parts.append(mixed.measure(Seen(outputs, whole={"clip.embedding": whole}, progress=0.1))[1])
    torch.testing.assert_close(torch.cat(parts), 0.6 * own + 0.4)
    assert torch.cat(parts).mean().item() == pytest.approx(1, rel=1e-5) and own.min() < 0.5


@pytest.mark.parametrize("progress", [0.2, 0.9])
def test_a_learned_weighting_goes_on_learning_after_its_end(progress):
    shapes = {"student.logits": (5,), "student.feature": (7,), "t.logits": (5,)}
    weighting = {"name": "ipwd", "normalize": True, "until": 0.5}
    kd = {"output": "logits", "distance": {"name": "kd"}, "weighting": weighting}
    learned = Objective({"kd": kd}, shapes)
    generator = torch.Generator().manual_seed(2)
    outputs = {name: torch.randn(6, *shape, generator=generator) for name, shape in shapes.items()}
    seen = Seen(outputs, label=torch.arange(6) % 5, label_values=[i % 5 for i in range(6)], progress=progress)
    loss = learned(seen)[0]["kd"]
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in learned.parameters())
    distance, weight, view = learned.terms["kd"].measure(seen)
    assert (weight == 1).all() == (progress > 0.5)
    auxiliary = learned.terms["kd"].weighting.auxiliary(view).mean()
    torch.testing.assert_close(loss, (weight * distance).mean() + auxiliary)


@pytest.mark.parametrize(
    ("weighting", "says"),
    [
        ({"until": 0.0}, "until=0.0: expected a share of the run above 0 and at most 1, such as 0.5"),
        ({"until": 1.5}, "until=1.5: expected a share of the run"),
        ({"until": -0.5, "fade": True}, "until=-0.5: expected a share of the run"),
        ({"until": float("nan")}, "until=nan: expected a share of the run"),
        ({"until": 1.0}, "until=1.0: ignored, since the run ends there; leave it out, or set `fade`"),
        ({"fade": True}, "fade=true: ignored without `until`; set objective.a.weighting.until"),
        ({"mix": 1.0}, "mix=1.0: expected a share of uniform weights of at least 0 and below 1"),
        ({"mix": -0.1}, "mix=-0.1: expected a share of uniform weights"),
        ({"mix": "much"}, "mix='much': expected float"),
        ({"untill": 0.5}, "untill: no such setting"),
        ({"name": "uniform", "until": 0.5}, "until: ignored, since the weights of uniform are uniform already"),
        ({"name": "uniform", "mix": 0.5}, "mix: ignored, since the weights of uniform are uniform already"),
        ({"name": "wsld", "until": 0.5}, "until: the mean weight of wsld is not one, .* set normalize=true"),
        ({"name": "ipwd", "mix": 0.5}, "mix: the mean weight of ipwd is not one"),
        ({"name": "test_distill_blend:Mixed"}, "name=test_distill_blend:Mixed: has an argument `mix`, a setting that"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_their_place_before_any_data(tmp_path, weighting, says):
    terms = {"a": {"distance": {"name": "mse"}, "weighting": {"name": "srw", **weighting}}}
    with pytest.raises(UserError, match=rf"^objective\.a\.weighting\.{says}") as error:
        objective.check(terms)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=rf"objective\.a\.weighting\.{says}"):
        text = yaml.safe_dump(terms["a"], default_flow_style=True, width=1000).strip()
        pipeline.check(tiny.load(tmp_path, f"objective.a={text}"))


class Mixed:
    """A weighting whose argument is one of the settings that every weighting takes."""

    def __init__(self, mix: float = 0.5) -> None:
        self.mix = mix


def test_settings_that_change_nothing_are_the_same_method(tmp_path):
    plain = variants.settled(tiny.load(tmp_path))
    for override in ("until=null", "mix=0", "fade=false"):
        assert variants.settled(tiny.load(tmp_path, f"objective.embedding.weighting.{override}")) == plain
    changed = variants.settled(tiny.load(tmp_path, "objective.embedding.weighting.until=0.5"))
    assert {key for key in changed if changed[key] != plain[key]} == {"objective.embedding.weighting.until"}


class Noted:
    """Uniform weights, noting the progress and the keys of each batch that asks for them."""

    calls: list[tuple[float | None, tuple[str, ...]]] = []

    def __call__(self, distance: torch.Tensor, seen: Seen) -> torch.Tensor:
        Noted.calls.append((seen.progress, tuple(seen.keys)))
        return torch.ones_like(distance)


NOTED = "objective.embedding.weighting.name=test_distill_blend:Noted"


def test_every_micro_batch_has_the_share_of_the_run_done_before_its_step(cached):
    Noted.calls = []
    distill.run(tiny.load(cached, NOTED, "train.accumulate=2"))
    training = [progress for progress, _ in Noted.calls if progress is not None]
    assert training == [step / 12 for step in range(12) for _ in range(2)]
    assert len(training) < len(Noted.calls)  # the validations
    Noted.calls = []
    distill.run(tiny.load(cached, NOTED, "objective.embedding.weighting.until=0.5", f"out={cached}/half"))
    assert [p for p, _ in Noted.calls if p is not None] == [step / 12 for step in range(6)]  # not asked afterwards


def test_a_view_of_several_teachers_has_the_progress_too():
    class Asked(torch.nn.Module):
        def forward(self, batch):
            return {"loss": torch.tensor(batch["progress"]), "epoch": torch.tensor(batch["epoch"])}

    both = SeveralTeachers({"a": Asked(), "b": Asked()})
    losses = both({"views": {"a": {}, "b": {}}, "epoch": 3.0, "progress": 0.25})
    assert (losses["loss"], losses["a/loss"], losses["b/epoch"]) == (0.5, 0.25, 3.0)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student.safetensors")


def test_a_stopped_run_with_a_schedule_resumes_to_the_same_weights(cached, monkeypatch):
    own = {"temperature": 0.1, "until": 0.6, "fade": "true", "mix": 0.1}
    settings = [f"objective.embedding.weighting.{key}={value}" for key, value in own.items()]
    whole = distill.run(tiny.load(cached, *settings, f"out={cached}/whole"))
    original = torch.optim.AdamW.step
    for end in (5, 9):  # before and after the end of the schedule
        recipe, calls = tiny.load(cached, *settings, f"out={cached}/stopped{end}"), itertools.count()

        def step(self, *args, calls=calls, end=end, **kwargs):
            if next(calls) == end:
                raise Killed
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(Killed):
            distill.run(recipe)
        monkeypatch.setattr(torch.optim.AdamW, "step", original)
        assert same(weights(distill.run(recipe)), weights(whole)) and rows(cached / f"stopped{end}") == rows(whole)
    settings[2] = "objective.embedding.weighting.fade=false"
    assert not same(weights(distill.run(tiny.load(cached, *settings, f"out={cached}/sudden"))), weights(whole))


@pytest.mark.parametrize("weighting", ["{name: srw, temperature: 0.1, until: 0.5, fade: true}", "{name: regional_srw}"])
def test_accumulation_takes_the_same_steps_with_a_schedule_and_with_regions(cached, weighting):
    settings = [f"objective.embedding.weighting={weighting}", "student.name=test_distill:Still"]
    plain = distill.run(tiny.load(cached, *settings, f"out={cached}/plain"))
    halves = distill.run(tiny.load(cached, *settings, "train.accumulate=2", f"out={cached}/halves"))
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(halves)[name], value, rtol=2e-4, atol=2e-5)


def test_the_recipe_of_the_first_half_differs_from_srw_in_until_alone():
    half, srw = (recipes.load(f"recipes/sam/mobilesam_{name}.yaml") for name in ("srw_first_half", "srw"))
    own = half.objective["embedding"]["weighting"]
    assert own == {**srw.objective["embedding"]["weighting"], "until": 0.5} and half.cache == srw.cache


def test_a_share_of_one_is_exact():
    assert Blend(until=0.5, mix=0.3).share(0.5) == 1 == Blend(until=0.7, fade=True, mix=0.1).share(0.9)
