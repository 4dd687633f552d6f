"""Labels are each image's own: one image without a label concerns no other."""

import dataclasses

import pytest
import torch
import toy_digits

from fmdistill import cache, distill, recipe
from fmdistill.distill import engine as engine_module
from fmdistill.distill import tasks
from fmdistill.distill.data import every
from fmdistill.distill.loader import batches
from fmdistill.distill.seen import Seen
from fmdistill.images import build, digits
from fmdistill.registry import UserError

KD = "objective.label={output: logits, distance: {name: kd}, weighting: {name: uniform}}"
LIVE = ("teacher.live=true", "cache=null")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a trained teacher, and the key of the training image that from then on has no label."""
    folder = tmp_path_factory.mktemp("labels")
    settings = toy_digits.trained(folder)
    key, encode = build(settings.images).source.keys("train-000")[3], digits._encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            digits, "_encode", lambda one: dataclasses.replace(encode(one), label=None) if one == key else encode(one)
        )
        labels = digits.Digits.labels

        def labels_without(self, shard):
            known = zip(self.keys(shard), labels(self, shard), strict=True)
            return [None if one == key else label for one, label in known]

        patch.setattr(digits.Digits, "labels", labels_without)
        cache.run(settings)
        yield folder, key


def load(folder, *overrides):
    return recipe.load(folder / "student.yaml", overrides)


def first_batch(settings, size=20):
    job = tasks.build(settings)
    batch = next(batches(job.train, list(every(job.train, size)), 0))
    return job, (batch if job.complete is None else job.complete(batch))


@pytest.mark.parametrize("how", [(), LIVE])
def test_accuracy_is_over_the_labelled_images_of_the_batch(made, how):
    folder, key = made
    job, batch = first_batch(load(folder, KD, *how))
    assert batch["labels"].tolist() == batch["label_values"]
    assert [k for k, value in zip(batch["keys"], batch["label_values"], strict=True) if value < 0] == [key]
    task = job.task.eval()
    with torch.no_grad():
        logits = job.student(task.preprocess.normalize(batch["pixels"], batch["sizes"]))["logits"]
        for row in (0, 1, 2, 5, 6):  # so that some are right
            batch["labels"][row] = batch["label_values"][row] = int(logits[row].argmax())
        right = [
            int(row.argmax()) == label for row, label in zip(logits, batch["label_values"], strict=True) if label >= 0
        ]
        assert len(right) == 19 and 5 <= sum(right) < 19
        assert float(task(batch)["accuracy"]) == pytest.approx(sum(right) / 19)


@pytest.mark.parametrize("how", [(), LIVE])
def test_an_objective_that_asks_for_labels_names_the_image_without(made, how):
    folder, key = made
    settings = load(folder, f"out={folder}/run{len(how)}", "train.steps=4", *how)  # an epoch of four steps
    message = f"distance.name=cross_entropy: learns from labels, but image '{key}' has none; .*leave this image out"
    with pytest.raises(UserError, match=message):
        distill.run(settings)


def test_frequencies_of_classes_name_the_image_without_a_label(made):
    folder, key = made
    rectified = KD.replace("output", "rectify: {name: krd_logits}, output")
    for how in ((), LIVE):
        with pytest.raises(UserError, match=f"needs a label from 0 to 9; '{key}' has none"):
            tasks.build(load(folder, rectified, *how))


def test_looking_at_labels_reads_nothing_from_the_device(made):
    folder, _ = made
    job, batch = first_batch(load(folder, KD))
    batch["labels"] = batch["labels"].to("meta")  # where no value can be read
    assert job.task.see(batch).labelled == 19


def test_a_batch_without_any_label_has_no_accuracy_and_processes_may_differ_in_that(made, monkeypatch):
    folder, _ = made
    job, batch = first_batch(load(folder, KD))
    batch["labels"].fill_(-1)
    batch["label_values"] = [-1] * 20
    assert "accuracy" not in job.task(batch)
    engine = engine_module.Engine(load(folder).train)
    assert engine.mean({"b": torch.tensor(0.25), "a": torch.tensor(3)}) == {"a": 3.0, "b": 0.25}
    monkeypatch.setattr(engine_module, "gather_object", lambda names: [*names, ["a", "c"]])
    monkeypatch.setattr(engine.accelerator, "reduce", lambda own, how: own + torch.tensor([[1.0, 0, 7], [1, 0, 1]]))
    assert engine.mean({"a": torch.tensor(3.0), "b": torch.tensor(0.25)}) == {"a": 2.0, "b": 0.25, "c": 7.0}


def test_a_label_of_a_class_that_the_student_does_not_know_is_named():
    seen = Seen({"student.logits": torch.zeros(2, 3)}, label=torch.tensor([0, 3]), keys=("a", "b"), label_values=(0, 3))
    with pytest.raises(
        UserError, match="x: image 'b' has the label 3, but the student's logits are of 3 classes, .*0 to 2"
    ):
        seen.labels("x")
