"""Training on images and their captions from a cache: learns, resumes, and any number of workers sees the same."""

from dataclasses import replace
from pathlib import Path

import clip_run
import clips
import pytest
import torch
from test_cache_captions import write
from test_distill import Killed, rows, same, weights

from fmdistill import cache, distill
from fmdistill.distill import tasks
from fmdistill.distill.engine import Engine
from fmdistill.distill.loader import batches
from fmdistill.distill.tasks import open_task
from fmdistill.distill.train import step_batches
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

TERMS = "{embedding: {distance: {name: mse, normalize: true}, weighting: {name: uniform}, scale: 20}, "
TERMS += "relations: {distance: {name: crd}, weighting: {name: srw, temperature: 0.1}}, "
TERMS += "interaction: {distance: {name: icl}, weighting: {name: uniform}, scale: 0.5}, "
TERMS += "pairs: {distance: {name: contrastive}, weighting: {name: uniform}}, "
TERMS += "similar: {distance: {name: affinity}, weighting: {name: uniform}}}"


def load(folder: Path, *overrides: str) -> Recipe:
    quick = ["train.batch_size=8", "train.steps=12", "train.precision=fp32", "train.device=cpu", "train.log_every=1"]
    quick += ["train.checkpoint_every=3", "train.validate_every=6", "train.accumulate=2", "optimizer.lr=0.01"]
    student = ["student.name=clip_run:Student", f"objective={TERMS}", "teacher.captions=3"]
    return clips.load(folder, *student, *quick, *overrides)


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Path:
    """A folder of sixteen captioned images and six of validation, cached."""
    folder = tmp_path_factory.mktemp("captioned")
    for name, count in (("00000", 8), ("00001", 8), ("v0", 6)):
        write(folder, name, count)
    cache.run(load(folder))
    return folder


def test_a_run_learns_its_losses_and_the_scales(cached):
    run = distill.run(load(cached))
    steps = [row for row in rows(run) if "learning_rate" in row]
    for name in ("embedding", "relations", "interaction", "pairs", "similar"):
        assert {name, f"{name}/largest_weight"} <= steps[0].keys() and f"validation/{name}" in rows(run)[-1]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    job, task = open_task(run, trust=True)
    scales = [task.objective.terms[name].distance.scale().item() for name in ("relations", "interaction", "pairs")]
    assert len(set(scales)) == 3 and all(abs(scale - 1 / 0.07) > 1e-3 for scale in scales)
    assert task.objective.terms["similar"].distance.logit_scale == pytest.approx(clips.model().logit_scale.exp().item())
    assert list(job.train.counts) == [8, 8]


def test_a_run_killed_anywhere_resumes_to_the_same_weights_and_log_by_any_number_of_workers(cached, monkeypatch):
    whole = distill.run(load(cached, f"out={cached}/whole"))
    original = torch.optim.AdamW.step
    for end in (1, 4, 8):
        recipe, calls = load(cached, f"out={cached}/stopped{end}", f"train.workers={end // 4}"), []

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


def test_a_cache_without_captions_is_refused_before_the_first_step(cached):
    bare = [f"cache.root={cached}/bare", "teacher.captions=0"]
    cache.run(load(cached, *bare))
    with pytest.raises(UserError, match=r"distance\.name=crd: .*teacher\.captions=1, in another cache\.root"):
        distill.run(load(cached, *bare, f"out={cached}/refused"))


class Shared(torch.nn.Module):
    """The toy student in two parts, of which several teachers' students share the trunk."""

    image_size, out_channels = clip_run.SIZE, clip_run.DIM

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = clip_run.Student().net[:4], torch.nn.Linear(256, clip_run.DIM)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": self.head(self.trunk(image))}


def test_each_of_several_teachers_has_its_own_step(cached):
    plain = load(cached)
    student, teacher = {"name": "test_distill_captions:Shared"}, {"name": "clips:teacher", "captions": 3}
    part = {"teacher": teacher, "cache": {"root": f"{cached}/cache"}, "student": student, "objective": plain.objective}
    recipe = replace(plain, teacher=None, cache=None, student={}, objective={}, teachers={"a": part, "b": part})
    job, engine = tasks.build(recipe), Engine(recipe.train)
    assert job.shared is not None
    parts = batches(job.train, [[(0, 0, n) for n in range(4)], [(0, 1, n) for n in range(4)]], 0)
    for part, batch in enumerate(step_batches(parts, engine, job.shared, job.complete)):
        for name in ("a", "b"):
            assert batch["whole"][f"{name}/student.embedding"].shape == (8, clip_run.DIM)
        losses = job.task(batch)
        losses["loss"].backward()
        if part == 0:
            first = {name: losses[f"{name}/pairs"].item() for name in ("a", "b")}
    for name in ("a", "b"):  # the second batch has the loss of the whole step too
        assert losses[f"{name}/pairs"].item() == pytest.approx(first[name], rel=1e-5)
