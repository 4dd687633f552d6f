"""Runs with standardised targets: what they save, how they resume and start, and what is refused before them."""

import json
from pathlib import Path

import clips
import numpy as np
import open_clip
import pytest
import test_distill_processes
import tiny
import torch
import toy_digits
from nondegenerate import randomize
from safetensors.torch import load_file
from test_distill_processes import settings, torchrun
from test_export_mobilesam import MINI
from torch import nn

from fmdistill import cache, distill, export, pipeline, recipe
from fmdistill.backbones.promptable import PromptHead
from fmdistill.distill import tasks
from fmdistill.distill.data import every
from fmdistill.distill.loader import batches
from fmdistill.distill.standardize import Standardizer, TeacherScale, fold, phi_s
from fmdistill.distill.student import load_student
from fmdistill.export import mobilesam
from fmdistill.mini.tinyvit import tinyvit_sam_mini
from fmdistill.registry import UserError

KINDS = ("channel", "phi_s")


class Normed(tiny.Student):
    """The toy student with a GroupNorm of one channel a group at its end, which holds no rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.GroupNorm(tiny.CHANNELS, tiny.CHANNELS))


class Unstated(tiny.Student):
    """The toy student without a last layer that it states."""

    last_layers = property(lambda self: {})


def load(folder: Path, kind: str, *overrides: str) -> recipe.Recipe:
    return tiny.load(folder, f"objective.embedding.standardize={kind}", f"out={folder}/{kind}", *overrides)


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def validation_batch(job: tasks.Job):
    return job.complete(next(batches(job.validation, list(every(job.validation, 8)), 0)))


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    cache.run(tiny.load(folder))
    return folder


@pytest.mark.parametrize("student", ["tiny:Student", "test_distill_targets:Normed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_student_is_the_folded_one_of_the_checkpoint_on_the_teachers_scale(cached, kind, student):
    out = f"{cached}/{kind}-{student[-6:]}"
    run = distill.run(load(cached, kind, f"student.name={student}", f"out={out}"))
    job = tasks.build(load(cached, kind, f"student.name={student}", f"out={out}"))
    job.task.load_state_dict(load_file(run / "checkpoints/step-00000012/task.safetensors"))  # the unfolded one
    batch = validation_batch(job)
    job.task.eval()
    seen, folded = job.task.see(batch), load_student(run, trust=True)
    embedding = folded(job.task.preprocess.normalize(batch["pixels"], batch["sizes"]))["embedding"]
    torch.testing.assert_close(embedding, seen.student("embedding"), rtol=1e-5, atol=1e-5)
    raw = job.student(job.task.preprocess.normalize(batch["pixels"], batch["sizes"]))["embedding"]
    assert (raw - embedding).abs().mean() > 0.05
    logged = rows(run)
    last = next(row for row in reversed(logged) if "validation/loss" in row)
    with torch.no_grad():
        assert float(job.task(batch)["loss"]) == pytest.approx(last["validation/loss"], rel=1e-4)
    opened = tasks.open_task(run, trust=True)[1]  # whose student is the folded one
    with torch.no_grad():
        assert float(opened(batch)["loss"]) == pytest.approx(last["validation/loss"], rel=1e-4)
    losses = [row["loss"] for row in logged if "learning_rate" in row]
    assert 0.3 < losses[0] < 10 and losses[-1] < 0.9 * losses[0]  # in units of the targets' deviation


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_folds_once_and_trains_the_same_weights(cached, kind, monkeypatch):
    whole = distill.run(load(cached, kind, f"out={cached}/{kind}-whole"))
    stopped = load(cached, kind, f"out={cached}/{kind}-killed")
    real = tasks.Distill.fold

    def killed(self):
        real(self)
        raise KeyboardInterrupt  # between folding and saving

    monkeypatch.setattr(tasks.Distill, "fold", killed)
    with pytest.raises(KeyboardInterrupt):
        distill.run(stopped)
    monkeypatch.setattr(tasks.Distill, "fold", real)
    assert not (cached / f"{kind}-killed/student.safetensors").exists()
    resumed = distill.run(stopped)
    first, second = (load_file(run / "student.safetensors") for run in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    folder = resumed / "checkpoints/step-00000008"
    names = {"mean_C", "scale_C", *(["rotation_CC"] if kind == "phi_s" else [])}
    assert {f"objective.terms.embedding.standardizer.{name}" for name in names} <= set(
        load_file(folder / "task.safetensors")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_starts_from_another_run_starts_on_the_teachers_scale(cached, kind):
    first = distill.run(load(cached, "none", f"out={cached}/start"))
    for student, start in (("tiny:Student", f"{first}"), ("tiny:Student", "none")):
        job = tasks.build(load(cached, kind, f"student.name={student}", f"student.pretrained={start}"))
        job.task.eval()
        batch = validation_batch(job)
        made = job.task.see(batch).student("embedding")
        own = load_student(first, trust=True)(job.task.preprocess.normalize(batch["pixels"], batch["sizes"]))
        equal = torch.allclose(made, own["embedding"], rtol=1e-4, atol=1e-4)
        assert equal == (start != "none")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mobilesam_checkpoint_gives_what_the_unfolded_student_learned(tmp_path, kind):
    student = randomize(tinyvit_sam_mini())
    mean, deviation = np.random.default_rng(0).normal(size=(2, 128)) + [[0], [3]]
    scale, turn = phi_s(np.diag(np.arange(1.0, 129)))
    of_kind = {
        "channel": Standardizer(mean, deviation),
        "phi_s": Standardizer(mean, np.full(128, scale), turn),
    }[kind]
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    unfolded = TeacherScale(student.last_layers["embedding"], of_kind)(student(image)["embedding"])
    fold(student, "embedding", of_kind)
    path = mobilesam.export(student, PromptHead.from_config(MINI), tmp_path / "mini.pt")
    again = tinyvit_sam_mini(pretrained=str(path)).eval()(image)["embedding"]
    torch.testing.assert_close(again, unfolded, rtol=1e-5, atol=1e-5)


def test_terms_of_one_output_share_its_units_and_a_term_without_them_sees_the_teachers_scale(cached):
    plain = "objective.plain={distance: {name: mse}, weighting: {name: uniform}}"
    job = tasks.build(load(cached, "channel", plain))
    seen = job.task.eval().see(validation_batch(job))
    losses, _ = job.task.objective(seen)
    gap = (seen.student("embedding") - seen.teacher("embedding")).square()
    assert float(losses["plain"]) == pytest.approx(float(gap.detach().mean()), rel=1e-5)
    assert float(losses["embedding"]) != pytest.approx(float(gap.mean()), rel=1e-2)


def test_a_projection_without_bias_learns_a_clips_vectors_in_either_units(tmp_path):
    for name, count in (("00000", 8), ("v0", 3)):
        clips.img2dataset(tmp_path, name, [f"{name}{n:04}" for n in range(count)])
    student = ["student.name=timm_clip", "student.model=test_efficientnet"]
    student += ["student.embed_dim=24", "student.image_size=32"]
    quick = ["train.batch_size=4", "train.steps=2", "train.precision=fp32", "train.device=cpu"]
    for kind in KINDS:
        loaded = clips.load(
            tmp_path, *student, *quick, f"objective.embedding.standardize={kind}", f"out={tmp_path}/{kind}"
        )
        cache.run(loaded)
        run = distill.run(loaded)
        job = tasks.build(loaded)
        job.task.load_state_dict(load_file(run / "checkpoints/step-00000002/task.safetensors"))
        job.task.eval()
        batch = job.complete(next(batches(job.validation, list(every(job.validation, 3)), 0)))
        image = job.task.preprocess.normalize(batch["pixels"], batch["sizes"])
        folded = load_student(run, trust=True)(image)["embedding"]
        torch.testing.assert_close(folded, job.task.see(batch).student("embedding"), rtol=1e-5, atol=1e-5)
        assert "head.proj.bias" not in load_file(run / "student.safetensors")
        exported = export.run(run, "openclip", tmp_path / f"exported/{kind}", trust=True)
        tower = open_clip.create_model(f"local-dir:{exported}").eval()
        torch.testing.assert_close(tower.encode_image(image), job.task.see(batch).student("embedding"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.live=true", "cache=null"], "standardize=channel: a live teacher has no statistics; leave teacher"),
        (["objective.embedding.distance.name=kd"], "standardize=channel: distance kd takes the softmax of the logits"),
        (["objective.embedding.distance={name: pad, base: fitnet}"], "distance pad learns a projection to the teacher"),
        (["objective.embedding.distance.name=vid"], "distance vid learns a projection to the teacher's output"),
        (
            ["objective.b={distance: {name: mse}, weighting: {name: uniform}, standardize: phi_s}"],
            "embedding.standardize=channel with padding=include, objective.b.standardize=phi_s with padding=include: "
            "the student's last layer of embedding learns in one kind of units",
        ),
        (
            ["objective.b={distance: {name: mse}, weighting: {name: uniform}, standardize: channel, padding: exclude}"],
            "objective.b.standardize=channel with padding=exclude",
        ),
        (["student.name=sam_mini"], "student.name=sam_mini does not state the last layer of embedding, .*last_layers"),
        (["objective.embedding.standardize=whiten"], "standardize='whiten': unknown. Known: channel, none, phi_s"),
    ],
)
def test_what_cannot_be_standardised_is_refused_by_check(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        pipeline.check(load(tmp_path, "channel", *overrides))
    assert "\n" not in str(caught.value)


def test_check_accepts_what_can_be_standardised_and_refuses_classifiers_and_recipes_without_a_teacher(tmp_path):
    for kind in ("none", *KINDS):
        pipeline.check(load(tmp_path, kind))
    _, student = toy_digits.write(tmp_path)
    term = "objective.f={output: feature, distance: {name: mse}, weighting: {name: uniform}, standardize: channel}"
    with pytest.raises(UserError, match="student.name=.* does not state the last layer of feature"):
        pipeline.check(recipe.load(student, [term]))
    with pytest.raises(UserError, match="objective.f.standardize=channel: the recipe has no teacher"):
        pipeline.check(recipe.load(toy_digits.write(tmp_path)[0], [term]))


def test_a_student_that_states_no_layer_or_has_other_channels_is_refused_before_training(cached):
    with pytest.raises(UserError, match="Unstated does not state the last layer of embedding"):
        distill.run(load(cached, "channel", "student.name=test_distill_targets:Unstated", f"out={cached}/unstated"))


@pytest.mark.slow
def test_two_processes_share_the_pass_over_the_cache_and_save_the_student_of_one(tmp_path):
    phi_s = "objective.embedding.standardize=phi_s"
    cache.run(tiny.load(tmp_path, *settings(tmp_path), phi_s))
    done = torchrun(tmp_path, phi_s, script=test_distill_processes.__file__)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "cache").glob("covariance-*.safetensors")
    shared = load_file(path)
    path.unlink()
    one = distill.run(tiny.load(tmp_path, *settings(tmp_path), phi_s, f"out={tmp_path}/one", "train.accumulate=1"))
    for name, value in load_file(path).items():
        torch.testing.assert_close(shared[name], value, rtol=1e-12, atol=1e-12)
    expected, made = (load_file(run / "student.safetensors") for run in (one, tmp_path / "two"))
    for name, value in expected.items():
        torch.testing.assert_close(made[name], value, rtol=0, atol=1e-4)
