"""One student for two teachers: a shared trunk, a run of each, and the gradients of both. torchrun starts this too."""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import clip_run
import pytest
import test_distill_processes as processes
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

import fmdistill
from fmdistill import cache, distill, pipeline
from fmdistill import recipe as recipes
from fmdistill.cache.batch import fill
from fmdistill.distill import joined, tasks
from fmdistill.distill.checkpoint import save_state
from fmdistill.distill.student import load_student
from fmdistill.files import write_whole
from fmdistill.mini.tinyvit import tinyvit_clip_mini, tinyvit_clip_shared_mini, tinyvit_sam_mini
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.several import by_teacher


class Trunk(nn.Sequential):
    """Parameters and buffers that both students have; the BatchNorm's statistics can be frozen."""

    def __init__(self, channels: int = 16, frozen: bool = False) -> None:
        super().__init__(nn.Conv2d(3, channels, 8, 8), nn.BatchNorm2d(channels), nn.GELU())
        self.frozen = frozen

    def train(self, mode: bool = True):
        super().train(mode)
        if self.frozen:
            self[1].eval()
        return self


class SamStudent(nn.Module):
    """{"embedding": (B, 32, 4, 4)} of images of 64 px."""

    image_size, out_channels = 64, tiny.CHANNELS

    def __init__(self, channels: int = 16, frozen: bool = False) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(channels, frozen), nn.Conv2d(channels, tiny.CHANNELS, 3, 2, padding=1)
        if frozen:
            self.double()

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"embedding": (B, 32, 4, 4)}."""
        return {"embedding": self.head(self.trunk(image.to(self.head.weight.dtype)))}


class ClipStudent(nn.Module):
    """{"embedding": (B, 24)} of images of 32 px."""

    image_size, out_channels = clip_run.SIZE, clip_run.DIM

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(16, frozen), nn.Linear(16, clip_run.DIM, bias=False)
        if frozen:
            self.double()

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"embedding": (B, 24)}."""
        return {"embedding": self.head(self.trunk(image.to(self.head.weight.dtype)).mean((2, 3)))}


class Headless(nn.Module):
    """A student without a trunk."""

    image_size, out_channels = clip_run.SIZE, clip_run.DIM

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, clip_run.DIM)


RECIPE = """
out: {folder}/run
images: {{name: image_classes, root: {folder}/train, validation_root: {folder}/val}}
teachers:
  sam:
    teacher: {{name: "tiny:teacher"}}
    cache: {{root: {folder}/sam, codec: fp16}}
    student: {{name: "test_distill_several:SamStudent"}}
    objective:
      embedding: {{distance: {{name: mse}}, weighting: {{name: srw, temperature: 0.5}}}}
  clip:
    teacher: {{name: open_clip, model: "local-dir:{folder}/teacher", device: cpu, workers: 0}}
    cache: {{root: {folder}/clip}}
    student: {{name: "test_distill_several:ClipStudent"}}
    objective:
      embedding:
        distance: {{name: mse}}
        weighting: {{name: srw, temperature: 0.5, group: global_batch}}
        scale: 3.0
task: {{name: distill}}
optimizer: {{name: adamw, lr: 0.003}}
schedule: {{name: cosine, warmup: 0.1}}
train: {{steps: 6, batch_size: 8, workers: 0, window: 2, precision: fp32, log_every: 1, validate_every: 3,
  checkpoint_every: 2, device: cpu}}
protocols: [eval/cosine.yaml]
"""


def load(folder: Path, *overrides: str) -> Recipe:
    write_whole(folder / "several.yaml", RECIPE.format(folder=folder))  # both processes of a launcher write and read it
    return recipes.load(folder / "several.yaml", overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with images and both caches."""
    path = tmp_path_factory.mktemp("several")
    clip_run.write_teacher(path / "teacher")
    clip_run.write_classes(path / "train", 6)
    clip_run.write_classes(path / "val", 2, seed=50)
    for part in by_teacher(load(path)).values():
        cache.run(part)
    return path


@pytest.fixture(scope="module")
def finished(folder) -> tuple[Recipe, dict]:
    recipe = load(folder)
    return recipe, pipeline.run(recipe)


def test_the_loss_and_its_gradients_are_the_sums_of_both_teachers(folder):
    recipe = load(folder)
    alone = {name: tasks.build(part) for name, part in by_teacher(recipe).items()}
    job = tasks.build(recipe)
    for name, single in alone.items():  # the same weights, each student with a trunk of its own
        single.student.load_state_dict(copy.deepcopy(job.parts[name].student.state_dict()))
    places = [(0, 0, index) for index in range(4)]
    batch = job.complete(fill(job.train, places))
    losses = job.task(batch)
    losses["loss"].backward()
    expected = {}
    for name, single in alone.items():
        view = single.complete(fill(single.train, places))
        assert view["keys"] == batch["keys"] == batch["views"][name]["keys"]
        expected[name] = single.task(view)["loss"]
        expected[name].backward()
        assert losses[f"{name}/loss"] == expected[name]
    assert losses["loss"] == expected["sam"] + expected["clip"]
    sam, clip = (job.parts[name].student for name in ("sam", "clip"))
    assert sam.trunk[0].weight is clip.trunk[0].weight and sam.trunk[1].running_mean is not clip.trunk[1].running_mean
    own = [alone[name].student for name in ("sam", "clip")]
    torch.testing.assert_close(sam.trunk[0].weight.grad, own[0].trunk[0].weight.grad + own[1].trunk[0].weight.grad)
    assert all(single.trunk[0].weight.grad.abs().max() > 1e-4 for single in own)
    torch.testing.assert_close(clip.head.weight.grad, own[1].head.weight.grad)


def test_the_run_holds_a_run_of_each_teacher(finished):
    recipe, rows = finished
    assert set(rows) == {"eval/cosine.yaml (sam)", "eval/cosine.yaml (clip)"}
    out = Path(recipe.out)
    sam, clip = load_student(out / "sam", trust=True), load_student(out / "clip", trust=True)
    assert torch.equal(sam.trunk[0].weight, clip.trunk[0].weight)
    assert not torch.equal(sam.trunk[1].running_var, clip.trunk[1].running_var)
    for name in ("sam", "clip"):
        saved = recipes.load_saved(out / name, ["trust=true"])
        assert saved == by_teacher(recipe)[name]
        stored = json.loads((out / name / "evaluation" / "cosine.json").read_text())
        assert [row["value"] for row in stored["rows"]] == [row["value"] for row in rows[f"eval/cosine.yaml ({name})"]]
    shared = load_file(out / "student.safetensors")
    assert "students.sam.trunk.0.weight" in shared and "students.clip.trunk.0.weight" not in shared
    assert pipeline.runs_of(recipe) == [f"{out}/sam", f"{out}/clip"]
    assert (out / "sam" / "evaluation" / "cosine.json").stat().st_mtime_ns and pipeline.run(recipe) == rows


def test_the_number_of_parts_that_a_run_chose_is_in_the_recipe_of_each_teacher(folder):
    out = distill.run(load(folder, f"out={folder}/auto", "train.batch_size=auto", "train.steps=2"))
    chosen = [recipes.load_saved(out / name, ["trust=true"]).train.accumulate for name in ("sam", "clip")]
    assert chosen == [1, 1]  # a CPU takes all images at once


def test_the_run_of_all_teachers_is_refused_where_one_teacher_is_needed(finished):
    out = finished[0].out
    with pytest.raises(UserError, match=rf"a run of several teachers; name the run of one of them: {out}/sam, "):
        load_student(out, trust=True)
    with pytest.raises(UserError, match="a run of several teachers"):
        fmdistill.load(out, trust=True)


def test_a_stopped_run_resumes_to_the_same_weights(folder, monkeypatch, finished):
    recipe = load(folder, f"out={folder}/stopped")
    calls, forward = [], joined.SeveralTeachers.forward

    def failing(self, batch):
        calls.append(batch["keys"])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(joined.SeveralTeachers, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        distill.run(recipe)
    assert not (Path(recipe.out) / "sam").exists()
    monkeypatch.undo()
    distill.run(recipe)
    resumed, whole = (load_file(f"{run.out}/student.safetensors") for run in (recipe, finished[0]))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_only_images_that_both_caches_hold_are_joined():
    def images(*shards: list[str]) -> SimpleNamespace:
        def item(epoch: int, shard: int, index: int) -> dict:
            return {"keys": shards[shard][index], "shards": "", "labels": torch.tensor(0), "label_values": 0}

        def read_batch(places: list) -> dict:
            return {"stored": [shards[shard][index] for _, shard, index in places]}

        return SimpleNamespace(shards=[SimpleNamespace(keys=keys) for keys in shards], item=item, read_batch=read_batch)

    both = joined.JoinedImages({"a": images(["x", "y", "z"], ["u"]), "b": images(["z", "x"], ["u", "v"])})
    assert both.counts == (2, 1)
    assert both.item(0, 0, 1)["keys"] == "z"
    assert {name: view["keys"] for name, view in both.item(0, 0, 1)["views"].items()} == {"a": "z", "b": "z"}
    stored = both.read_batch([(0, 1, 0), (0, 0, 0), (0, 0, 1)])["stored_views"]
    assert stored == {"a": ["u", "x", "z"], "b": ["u", "x", "z"]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.name=sam_mini"], "teacher: ignored, since this recipe has `teachers`"),
        (["student.name=tinyvit_sam_mini"], r"student: ignored, .* move it to teachers.sam.student"),
        (["teachers.sam.cache=null"], "teachers.sam.cache="),
        (["teachers.sam.extra=1"], "teachers.sam.extra: no such setting"),
        (["teachers.sam.student.channels=x"], "student.channels='x'"),
        (["teachers.other.teacher.name=sam_mini"], "teachers.other.cache: required"),
        (["task.name=classify"], "task.name=classify: has one teacher or none"),
        (["teachers.clip.teacher.live=true"], "cache: ignored, since teacher.live=true"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_work(folder, overrides, message):
    with pytest.raises(UserError, match=message):
        pipeline.check(load(folder, *overrides))


def test_a_protocol_judges_the_students_that_it_can_judge():
    protocols = "protocols=[eval/sam_grid_demo.yaml, eval/clip_mini_suite.yaml, eval/cosine.yaml]"
    mini = recipes.load("recipes/several/mini.yaml", [protocols])
    sam, clip, both = mini.protocols
    assert pipeline.protocols_by_teacher(mini) == {"sam": [sam, both], "clip": [clip, both]}
    with pytest.raises(UserError, match="classif"):
        pipeline.check(recipes.load("recipes/several/mini.yaml", ["protocols=[eval/cifar100_top1.yaml]"]))


def test_a_name_that_cannot_be_a_folder_and_a_single_teacher_are_refused(folder):
    recipe = load(folder)
    for name in ("checkpoints", "Sam", "a/b"):
        with pytest.raises(UserError, match=f"teachers.{name}: names a folder in the run"):
            by_teacher(recipes.dataclasses.replace(recipe, teachers={**recipe.teachers, name: {}}))
    with pytest.raises(UserError, match="1 teacher; name two or more"):
        by_teacher(recipes.dataclasses.replace(recipe, teachers={"sam": recipe.teachers["sam"]}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teachers.clip.student.name=test_distill_several:Headless", "Headless has no trunk that students could share"),
        ("teachers.sam.student.channels=8", r"its trunk does not fit .* 4 shapes differ and 0 names are missing"),
    ],
)
def test_students_without_a_common_trunk_are_refused(override, message):
    students = {"sam": SamStudent(8 if "channels" in override else 16), "clip": ClipStudent()}
    if "Headless" in override:
        students["clip"] = Headless()
    with pytest.raises(UserError, match=message):
        joined.share_trunk(students)


def test_the_mini_students_fit_each_other_and_the_usual_ones_do_not():
    sam, clip = tinyvit_sam_mini(windows=(8, 8, 8, 8)), tinyvit_clip_shared_mini()
    joined.share_trunk({"sam": sam, "clip": clip})
    assert clip(torch.zeros(2, 3, 64, 64))["embedding"].shape == (2, 128)
    assert sam(torch.zeros(1, 3, 256, 256))["embedding"].shape == (1, 128, 16, 16)
    with pytest.raises(UserError, match="does not fit"):
        joined.share_trunk({"sam": tinyvit_sam_mini(), "clip": tinyvit_clip_mini()})


STEP = ["train.steps=2", "train.checkpoint_every=2", "train.validate_every=2", "train.clip=0.1"]
FROZEN = ["teachers.sam.student.frozen=true", "teachers.clip.student.frozen=true"]


def trained(folder: Path, out: str, accumulate: int) -> dict[str, torch.Tensor]:
    recipe = load(folder, *STEP, *FROZEN, f"out={folder}/{out}", f"train.accumulate={accumulate}")
    distill.run(recipe)
    return load_file(f"{recipe.out}/checkpoints/step-00000002/task.safetensors")


@pytest.mark.slow
def test_two_processes_and_accumulation_take_the_steps_of_one(folder):
    done = processes.torchrun(folder, script=__file__)
    assert done.returncode == 0, done.stderr[-3000:]
    one, accumulated, two = (
        trained(folder, "one", 1),
        trained(folder, "parts", 2),
        load_file(folder / "two.safetensors"),
    )
    assert one.keys() == two.keys() == accumulated.keys()
    assert one["tasks.sam.student.trunk.0.weight"].dtype == torch.float64
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)
        torch.testing.assert_close(accumulated[name], value, rtol=0, atol=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder_of_both = Path(sys.argv[1])
    weights = trained(folder_of_both, "two", 2)
    assert torch.distributed.get_world_size() == 2 and torch.distributed.get_backend() == "gloo"
    if torch.distributed.get_rank() == 0:
        save_state(weights, folder_of_both / "two.safetensors")
    torch.distributed.destroy_process_group()
