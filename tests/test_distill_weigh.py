"""Weights computed from finished runs, with which another run is trained."""

import json

import pytest
import torch
import toy_digits
from safetensors.torch import load_file

from fmdistill import cache, cli, distill, recipe
from fmdistill.distill import tasks, weigh
from fmdistill.distill.data import every
from fmdistill.distill.loader import batches
from fmdistill.registry import UserError

PAD = "objective.pad={output: block2, distance: {name: pad, base: fitnet}, weighting: {name: uniform}}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weigh")
    cache.run(toy_digits.trained(folder))
    runs = {}
    for name, overrides in (("pad", [PAD]), ("kd", []), ("label", ["objective.kd.scale=0.0001"])):
        runs[name] = distill.run(recipe.load(folder / "student.yaml", [*overrides, f"out={folder}/{name}"]))
    return folder, runs


def test_pad_s_weights_are_one_over_its_variances(made):
    folder, runs = made
    listed = json.loads(weigh.by_pad(runs["pad"], folder / "pad.json").read_text())
    job = tasks.build(recipe.load_saved(runs["pad"]))
    job.task.load_state_dict(load_file(runs["pad"] / "checkpoints/step-00000008/task.safetensors"))
    job.task.eval()
    batch = job.complete(next(batches(job.train, list(every(job.train, 120)), 0)))
    pad, seen = job.task.objective.terms["pad"].distance, job.task.see(batch).focus("block2", "include")
    variance = pad.branch(pad.projection(seen.student())).clamp(-10, 10).exp().detach()
    expected = 1 / variance.mean((1, 2, 3))
    assert list(listed) == batch["keys"] and len(listed) == 120
    torch.testing.assert_close(torch.tensor(list(listed.values())), expected, rtol=1e-4, atol=1e-6)
    assert float(expected.std()) > 0


def test_propensity_weights_compare_the_two_students(made):
    folder, runs = made
    weights = json.loads(weigh.by_propensity(runs["kd"], runs["label"], folder / "weights.json").read_text())
    back = json.loads(weigh.by_propensity(runs["label"], runs["kd"], folder / "back.json").read_text())
    for key, weight in weights.items():  # 1 + a / b and 1 + b / a
        assert (weight - 1) * (back[key] - 1) == pytest.approx(1, rel=1e-3)
    equal = json.loads(weigh.by_propensity(runs["kd"], runs["kd"], folder / "equal.json").read_text())
    assert all(weight == pytest.approx(2, rel=1e-4) for weight in equal.values())


def test_another_run_learns_with_them(made, capsys):
    folder, runs = made
    assert cli.main(["weigh", "pad", str(runs["pad"]), f"{folder}/file.json"]) == 0
    assert capsys.readouterr().out.strip() == f"{folder}/file.json"
    overrides = [f"objective.kd.weighting={{name: by_key, weights: {folder}/file.json}}", f"out={folder}/weighed"]
    out = distill.run(recipe.load(folder / "student.yaml", overrides))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert 0 < rows[0]["kd/effective_sample_size"] < 1 < rows[0]["kd/largest_weight"]


def test_outputs_that_cannot_be_weighed_raise(made):
    folder, runs = made
    with pytest.raises(UserError, match="0 terms of its objective are a PAD"):
        weigh.by_pad(runs["kd"], folder / "no.json")
    with pytest.raises(UserError, match="contains no recipe.yaml"):
        weigh.by_pad(folder / "nowhere", folder / "no.json")
    assert cli.main(["weigh", "ipwd", str(runs["kd"]), f"{folder}/no.json"]) == 2
    assert not (folder / "no.json").exists()
