"""Task `classify`: labels alone, a cached teacher and a live one, which give the same batch."""

import json

import numpy as np
import pytest
import torch
import toy_digits

from fmdistill import cache, distill, pipeline, recipe
from fmdistill.distill import provider, tasks
from fmdistill.distill.data import every
from fmdistill.distill.loader import batches
from fmdistill.distill.plain import Augment
from fmdistill.registry import UserError

LIVE = ["teacher.live=true", "cache=null"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    settings = toy_digits.trained(folder)
    cache.run(settings)
    return folder, settings


def load(folder, *overrides):
    return recipe.load(folder / "student.yaml", overrides)


def one_batch(settings, size=20):
    job = tasks.build(settings)
    batch = next(batches(job.train, list(every(job.train, size)), 0))
    return job, (batch if job.complete is None else job.complete(batch))


def test_a_live_teacher_gives_the_batch_that_the_cache_gives(made):
    folder, settings = made
    (job, cached), (live_job, live) = one_batch(settings), one_batch(load(folder, *LIVE))
    assert cached["keys"] == live["keys"] and torch.equal(cached["labels"], live["labels"])
    assert torch.equal(cached["pixels"], live["pixels"])
    assert cached["outputs"].keys() == live["outputs"].keys() == {f"classifier.{n}" for n in job_outputs()}
    for name, value in cached["outputs"].items():
        torch.testing.assert_close(value, live["outputs"][name], atol=1e-5, rtol=1e-5)
    losses, others = job.task(cached), live_job.task(live)
    torch.testing.assert_close(losses["loss"], others["loss"])
    assert live_job.task.state_dict().keys() == job.task.state_dict().keys()  # the teacher is in neither


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_a_live_teacher_and_plain_images_fill_the_same_batch(made, workers):
    folder, settings = made
    cached = provider.build(settings)
    live = provider.build(load(folder, *LIVE))
    plain = provider.build(load(folder, "teacher=null", "cache=null"), cached.preprocess)
    filled = [cached.train.batch([(0, index) for index in range(5)])]  # as evaluators read
    for source in (cached, live, plain):
        batch = next(batches(source.train, [[(0, 0, index) for index in range(5)]], workers))
        filled.append(batch if source.complete is None else source.complete(batch))
    for batch in filled:
        tensors = {name: (v.dtype, tuple(v.shape)) for name, v in batch.items() if isinstance(v, torch.Tensor)}
        assert tensors == {
            "pixels": (torch.uint8, (5, 3, 8, 8)),
            "sizes": (torch.int64, (5, 2)),
            "originals": (torch.int64, (5, 2)),
            "labels": (torch.int64, (5,)),
        }
        lists = {name: {type(value) for value in v} for name, v in batch.items() if isinstance(v, list)}
        assert lists == {"keys": {str}, "shards": {str}, "label_values": {int}}
        assert batch.keys() == {*tensors, *lists, "outputs"}
        assert batch["labels"].tolist() == batch["label_values"] and set(batch["shards"]) == {"train-000"}
        assert batch["sizes"].tolist() == batch["originals"].tolist() == [[8, 8]] * 5
        assert all(torch.equal(batch[name], filled[0][name]) for name in tensors)
        assert all(batch[name] == filled[0][name] for name in lists)
    outputs = [{name: (v.dtype, v.shape) for name, v in batch["outputs"].items()} for batch in filled]
    assert outputs[0] == outputs[1] == outputs[2] and len(outputs[0]) == 3 and outputs[3] == {}


def job_outputs():
    return ("logits", "feature", "block2")


def test_accuracy_and_the_terms_are_those_of_the_batch(made):
    job, batch = one_batch(made[1])
    job.task.eval()
    found = job.task(batch)
    logits = job.student(job.task.preprocess.normalize(batch["pixels"], batch["sizes"]))["logits"]
    assert found["accuracy"] == (logits.argmax(1) == batch["labels"]).float().mean()
    torch.testing.assert_close(found["label"], torch.nn.functional.cross_entropy(logits, batch["labels"]))
    torch.testing.assert_close(found["loss"], found["label"] + found["kd"])


def test_labels_are_kept_in_the_cache(made):
    job, batch = one_batch(made[1], 120)
    assert np.bincount(batch["labels"]).sum() == 120 and int(batch["labels"].max()) == 9
    counts = provider.priors(provider.build(made[1]), 10).counts
    assert torch.equal(counts, torch.bincount(batch["labels"], minlength=10))
    means = provider.priors(provider.build(made[1]), 10).means("feature")
    mine = batch["outputs"]["classifier.feature"][batch["labels"] == 3].mean(0)
    torch.testing.assert_close(means[3], mine)


def test_a_term_s_warmup_rises_with_the_epochs(made):
    folder, _ = made
    job, batch = one_batch(load(folder, "objective.kd.warmup=4", "objective.kd.scale=2"))
    job.task.eval()
    whole = job.task(batch)["kd"]
    for epoch, share in ((0.0, 0.0), (1.0, 0.25), (3.0, 0.75), (4.0, 1.0), (9.0, 1.0)):
        torch.testing.assert_close(job.task({**batch, "epoch": epoch})["kd"], whole * share)


def test_the_teacher_of_a_recipe_learned_its_labels(made):
    rows = [json.loads(line) for line in (made[0] / "teacher/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["validation/accuracy"] > 0.5  # chance is 0.1


def test_augmentation_is_drawn_from_seed_epoch_and_key(made):
    folder, _ = made
    settings = load(folder, *LIVE, "task.crop=2", "task.flip=true")
    train = provider.build(settings, augment=Augment(2, True)).train
    first, again, other = train.item(0, 0, 3), train.item(0, 0, 3), train.item(1, 0, 3)
    assert torch.equal(first["pixels"], again["pixels"])
    drawn = [train.item(epoch, 0, 3)["pixels"] for epoch in range(40)]
    assert any(not torch.equal(first["pixels"], one) for one in drawn) and other["keys"] == first["keys"]
    plain = provider.build(settings).train.item(0, 0, 3)["pixels"]
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2))
    windows = [padded[:, t : t + 8, left : left + 8] for t in range(5) for left in range(5)]
    possible = windows + [window.flip(2) for window in windows]
    assert all(any(torch.equal(one, window) for window in possible) for one in drawn)


@pytest.mark.parametrize("distance", ["cc", "cosine", "rkd", "vid", "fitnet", "pad", "mse"])
def test_every_kind_of_distance_learns_from_a_live_teacher(made, distance):
    folder, _ = made
    term = f"{{output: feature, distance: {{name: {distance}}}, weighting: {{name: uniform}}}}"
    wide = ["student.width=4"] if distance in ("cosine", "pad", "mse") else []
    settings = load(folder, *LIVE, *wide, f"objective.x={term}")
    job, batch = one_batch(settings)
    job.task(batch)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in job.task.parameters())


def test_a_rectifier_without_frequencies_asks_for_none(made, monkeypatch):
    folder, _ = made
    monkeypatch.setattr(provider, "priors", None)
    swapped = tasks.build(load(folder, "objective.kd.rectify={name: probability_swap}"))
    assert swapped.task.objective.terms["kd"].rectify is not None
    with pytest.raises(TypeError):
        tasks.build(load(folder, "objective.kd.rectify={name: krd_logits}"))


def test_an_output_that_nobody_makes_is_told_with_those_that_are_made(made):
    folder, _ = made
    with pytest.raises(
        UserError, match=r"not known for this recipe: output=blok2\. Known: classifier\.block2, classifier\.feature"
    ):
        tasks.build(load(folder, "objective.x={output: blok2, distance: {name: fitnet}, weighting: {name: uniform}}"))


def test_what_cannot_be_is_said_before_training(made):
    folder, _ = made
    with pytest.raises(UserError, match=r"add teacher\.live=true"):
        tasks.build(load(folder, "task.crop=1"))
    with pytest.raises(UserError, match="trains a classifier, such as resnet20"):
        tasks.build(load(folder, "student.name=tinyvit_clip_mini"))
    with pytest.raises(UserError, match="sees 32 px, its teacher 8 px"):
        tasks.build(load(folder, "student={name: resnet20, classes: 10}"))
    with pytest.raises(UserError, match="the recipe needs one"):
        tasks.build(load(folder, "task={name: distill}", "teacher=null", "cache=null"))
    with pytest.raises(UserError, match="has no embedding; use task classify"):
        tasks.build(load(folder, "task={name: distill}"))
    with pytest.raises(UserError, match="runs during training and is not cached"):
        cache.run(load(folder, "teacher.live=true"))
    with pytest.raises(UserError, match="no such run or file; train the teacher first"):
        cache.run(load(folder, f"teacher.weights={folder}/nowhere", f"cache.root={folder}/other"))
    pipeline.check(load(folder, *LIVE))


def test_a_live_run_resumes_like_any_other(made):
    folder, _ = made
    settings = load(folder, *LIVE, "task.crop=1", f"out={folder}/live", "train.checkpoint_every=4")
    out = distill.run(settings)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 8 and rows[0]["kd"] > 0
    with pytest.raises(UserError, match="holds a run of another recipe: teacher.weights"):
        distill.run(load(folder, *LIVE, "task.crop=1", f"out={folder}/live", "train.checkpoint_every=4",
                         f"teacher.weights={folder}/other"))  # fmt: skip
