"""Tests of `check`: a setting that would be ignored raises an error before the work begins."""

import pytest
import tiny
import toy_digits

from fmdistill import pipeline, recipe, teachers
from fmdistill.distill import tasks
from fmdistill.distill.objective import Objective
from fmdistill.registry import UserError

KD = {"output": "logits", "distance": {"name": "kd"}, "weighting": {"name": "uniform"}}


def digits(folder, *overrides):
    return recipe.load(toy_digits.write(folder)[1], overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.statistics=cifar100"], "task.statistics=cifar100: ignored, .*teacher.statistics=digits; .*both alike"),
        (["teacher.statistics=cifar100"], "task.statistics=digits: ignored, .*teacher.statistics=cifar100"),
        (["teacher.live=true"], "cache: ignored, since teacher.live=true caches nothing; .*cache=null"),
        (["task.crop=1"], "task.crop.*: a cached teacher saw the images as they are; add teacher.live=true"),
        (["task.resized_crop=true", "teacher.live=true", "cache=null"], "train.image_memory=0.1: with task.resized"),
        (["cache.local_gb=20"], "cache.local_gb=20.0: only for a URL, but cache.root=.* is a folder; remove it"),
        (["cache.local=/tmp/x"], "cache.local=/tmp/x: only for a URL"),
        (["teacher.maps=[]", "objective.kd.padding=exclude"], "objective.kd.padding=exclude: ignored, .*output=logits"),
    ],
)
def test_settings_that_contradict_the_teacher_or_the_root_raise_without_data(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        pipeline.check(digits(tmp_path, *overrides))
    assert "\n" not in str(caught.value)


def test_settings_equal_to_the_teachers_or_left_to_it_are_valid(tmp_path):
    for overrides in ([], ["task.statistics=null"], ["task.statistics=null", "teacher.statistics=cifar100"]):
        pipeline.check(digits(tmp_path, *overrides))
    pipeline.check(recipe.load(toy_digits.write(tmp_path)[0]))


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("recipes/mini/sam_mini_scenes.yaml", "objective.x={distance: {name: mse}, weighting: {name: uniform}}"),
        ("recipes/mini/clip_mini.yaml", "objective.x={distance: {name: mse}, weighting: {name: uniform}}"),
        ("recipes/mini/clip_mini.yaml", "teacher={name: clip_mini}"),
    ],
)
def test_a_task_with_its_own_losses_needs_no_objective_and_no_teacher(path, part):
    more = ["cache={root: caches/x}"] if part.startswith("teacher") else []
    name = part.partition(".")[0].partition("=")[0]
    with pytest.raises(UserError, match=f"{name}: task (promptable|contrastive) ignores it, .*{name}=null"):
        pipeline.check(recipe.load(path, [part, *more]))


def test_the_padding_of_vectors_raises_when_their_shapes_are_known():
    settings = {"kd": {**KD, "padding": "exclude"}}
    with pytest.raises(UserError, match="objective.kd.padding=exclude: ignored, since output=logits is one vector"):
        Objective(settings, {"student.logits": (10,), "x.logits": (10,)})
    Objective({"kd": KD}, {"student.logits": (10,), "x.logits": (10,)})
    map_term = {"distance": {"name": "mse"}, "weighting": {"name": "uniform"}, "padding": "exclude"}
    Objective({"map": map_term}, {"student.embedding": (8, 4, 4), "sam.embedding": (8, 4, 4)})


def test_a_custom_teacher_determines_the_statistics_too(tmp_path):
    settings = toy_digits.trained(tmp_path)
    own = f"test_pipeline_check:teacher_in_{tmp_path.name}"
    globals()[f"teacher_in_{tmp_path.name}"] = lambda: teachers.build(settings.teacher)
    live = ["teacher={name: " + own + ", live: true}", "cache=null"]
    assert tasks.build(digits(tmp_path, *live)).complete is not None
    with pytest.raises(UserError, match="task.statistics=cifar100: the teacher's preprocessing has another mean"):
        tasks.build(digits(tmp_path, *live, "task.statistics=cifar100"))


def test_the_default_limit_of_local_copies_is_50_gb(tmp_path):
    far = tiny.load(tmp_path, "cache.root=file:///data/x").cache
    assert far is not None and far.local_gb is None and far.local_bytes == 50 * 10**9
    near = tiny.load(tmp_path, "cache.root=file:///data/x", "cache.local_gb=0.5").cache
    assert near is not None and near.local_bytes == 500_000_000
