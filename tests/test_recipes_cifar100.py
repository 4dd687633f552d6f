"""The recipes of the CIFAR-100 and ImageNet tables: their settings, a toy run, and the published figures beside it."""

import dataclasses
import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

from fmdistill import distill, evaluate, pipeline, recipe, report
from fmdistill.distill import tasks
from fmdistill.distill.loader import batches
from fmdistill.evaluate.results import value
from fmdistill.images.cifar100 import FILES
from fmdistill.recipe import locate
from fmdistill.report import rows
from fmdistill.stages import by_stage, last_stage

FILES_OF_RECIPES = [f"recipes/cifar100/{p.name}" for p in locate("recipes/cifar100/kd.yaml").parent.glob("*.yaml")]
METHODS = [name for study in ("srw", "pad") for name in recipe.variants(f"recipes/studies/cifar100_{study}")]
RECIPES = {recipe.load(name).out.removeprefix("runs/"): name for name in sorted([*METHODS, *FILES_OF_RECIPES])}
COUNTS = {"train": 24, "test": 12}
TEACHER = "cifar100/teachers/resnet32x4"
WITHOUT_TEACHER = {"cifar100/label", TEACHER}
RUN = {TEACHER, *(f"cifar100/{name}" for name in ("kd_srw", "fitnet", "dkd", "pad_l2"))}  # by tests of their own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny CIFAR-100 in torchvision's format, and a teacher of two steps."""
    folder, rng, md5 = tmp_path_factory.mktemp("cifar100"), np.random.default_rng(0), {}
    (folder / FILES).mkdir()
    for name in ("train", "test", "meta"):
        held = {"fine_label_names": [f"class {i}" for i in range(100)]}
        if name != "meta":
            labels = rng.integers(0, 100, COUNTS[name]).tolist()
            held = {"data": rng.integers(0, 256, (COUNTS[name], 3072), dtype=np.uint8), "fine_labels": labels}
        (folder / FILES / name).write_bytes(pickle.dumps(held))
        md5[name] = hashlib.md5((folder / FILES / name).read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
        patch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
        patch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5["meta"]})
        pipeline.run(load(folder, TEACHER))
        yield folder


def load(folder, name, *overrides):
    quick = [f"images.root={folder}", f"out={folder}/{name}", "train.steps=2", "train.batch_size=8"]
    quick += ["train.workers=0", "train.device=cpu", "train.log_every=1", "student.name=resnet20"]
    if name not in WITHOUT_TEACHER:
        quick += [
            f"teacher.weights={folder}/{TEACHER}",
            "teacher.network.name=resnet20",
            "teacher.device=cpu",
        ]
    return recipe.load(RECIPES[name], [*quick, *overrides])


def test_every_recipe_names_a_run_of_its_own_and_what_it_extends():
    loaded = {name: recipe.load(path) for name, path in RECIPES.items()}
    # kd.yaml is also the study's baseline, and a run of both is one run
    assert len(loaded) == len(METHODS) + len(FILES_OF_RECIPES) - 1
    assert loaded[TEACHER].out == loaded["cifar100/kd"].teacher["weights"]
    both = [recipe.load(name) for name in ("recipes/cifar100/kd.yaml", "recipes/studies/cifar100_srw:kd")]
    assert both[0] == dataclasses.replace(both[1], title=both[0].title)
    for name, one in loaded.items():
        pad = one.train.epochs != 240
        rates = (one.optimizer["lr"], one.train.batch_size, one.optimizer["weight_decay"])
        assert rates == (0.05, 64, 0.0005) or (pad and rates[1:] == (128, 0.0005))
        assert (one.teacher is None) == (name in WITHOUT_TEACHER) == (one.protocols == ["eval/labels_top1.yaml"])
        assert one.task == {"name": "classify", "statistics": "cifar100", "crop": 4, "flip": True}
    first, alone = by_stage(loaded["cifar100/pad_l2"])["l2"], loaded["cifar100/pad_l2_stage1"]
    assert first == dataclasses.replace(alone, out=first.out, title=first.title)


@pytest.mark.parametrize(
    ("name", "label", "scale", "output", "distance"),
    [
        ("kd", 0.1, 0.9, "logits", {"name": "kd", "temperature": 4.0}),
        ("fitnet", 1.0, 100.0, "block2", {"name": "fitnet"}),
        ("dkd", 1.0, 1.0, "logits", {"name": "dkd", "alpha": 1.0, "beta": 8.0, "temperature": 4.0}),
        ("pad_l2_stage1", 1.0, 15.0, "feature", {"name": "mse"}),
        ("pad_l2", 1.0, 1.0, "feature", {"name": "pad", "base": "l2"}),
    ],
)
def test_the_terms_are_the_tables(name, label, scale, output, distance):
    plain = last_stage(recipe.load(RECIPES[f"cifar100/{name}"])).objective
    assert (plain["label"]["scale"], plain["teacher"]["scale"]) == (label, scale)
    assert (plain["teacher"]["output"], plain["teacher"]["distance"]) == (output, distance)
    assert plain["teacher"]["weighting"] == {"name": "uniform"}
    if name in ("kd", "dkd", "fitnet"):
        weighed = recipe.load(RECIPES[f"cifar100/{name}_srw"]).objective
        assert weighed["teacher"].pop("weighting")["name"] == "srw" and plain["teacher"].pop("weighting")
        assert weighed == plain


@pytest.mark.parametrize("name", ["cifar100/kd_srw", "cifar100/fitnet", "cifar100/dkd"])
def test_a_recipe_runs_from_teacher_to_table(folder, name):
    (rows,) = pipeline.run(load(folder, name)).values()
    named = {(row["subject"], row["metric"], row.get("quartile")) for row in rows}
    assert {("student", "top1", None), ("teacher", "top1", None), ("student", "top1", "q1")} < named
    assert ("student", "top5", "q4") in named
    logged = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["label"] > 0 and "teacher/effective_sample_size" in logged[0]
    assert logged[0]["loss"] == pytest.approx(logged[0]["label"] + logged[0]["teacher"], rel=1e-5)


def test_pad_trains_on_from_its_first_stage(folder):
    alone = distill.load_student(distill.run(load(folder, "cifar100/pad_l2_stage1"))).state_dict()
    settings = load(folder, "cifar100/pad_l2", "stages.pad.train.steps=2")
    (judged,) = pipeline.run(settings).values()
    assert value(judged, "top1", quartile="q1") >= 0
    start, ended = (distill.load_student(run).state_dict() for run in (f"{settings.out}/l2", settings.out))
    assert all(torch.equal(start[name], value) for name, value in alone.items())
    assert any(not torch.equal(start[name], value) for name, value in ended.items())


@pytest.mark.parametrize("name", sorted({*RECIPES} - RUN))
def test_every_other_recipe_gives_a_loss_and_gradients(folder, name):
    job = tasks.build(load(folder, name))
    batch = next(batches(job.train, [[(0, 0, index) for index in range(6)]], 0))
    batch = batch if job.complete is None else job.complete(batch)
    losses = job.task({**batch, "epoch": 100.0})
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(p.grad is not None for p in job.task.parameters() if p.requires_grad)


def test_the_papers_tables_stand_beside_their_data_alone(folder):
    tables = {
        name: [table.source for table in rows.published(evaluate.load(f"eval/{name}.yaml").to_json())]
        for name in ("cifar100_top1", "imagenet_top1", "digits_top1", "labels_top1")
    }
    assert tables["digits_top1"] == tables["labels_top1"] == []
    assert len(tables["cifar100_top1"]) == 9 and not any("Table 3" in one for one in tables["cifar100_top1"])
    assert len(tables["imagenet_top1"]) == 3 and all("Table 3" in one for one in tables["imagenet_top1"])
    pipeline.run(load(folder, "cifar100/kd_srw"))
    shown = report.text([str(folder / "cifar100/kd_srw")])
    assert "Published: Yu et al." in shown and "ResNet32x4 79.42 to ResNet8x4 72.50" in shown and "73.93" in shown


@pytest.mark.parametrize("name", ["kd", "kd_srw", "pad_l2_stage1", "pad_l2"])
def test_the_imagenet_recipes_have_the_papers_settings(name):
    loaded = recipe.load(f"recipes/studies/imagenet_srw:{name}" if "kd" in name else f"recipes/imagenet/{name}.yaml")
    pipeline.check(loaded)
    loaded = last_stage(loaded)
    assert loaded.out == f"runs/imagenet/{name}" and loaded.train.batch_size == 512
    assert loaded.optimizer["weight_decay"] == 0.0001 and loaded.train.image_memory == 0
    assert loaded.train.epochs == {"pad_l2_stage1": 90, "pad_l2": 30}.get(name, 100)
    assert loaded.optimizer["lr"] == (0.002 if name == "pad_l2" else 0.2)
