"""Recipes of several stages: the runs of two recipes by hand, resumed anywhere. torchrun starts this file too."""

import dataclasses
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import test_distill_processes as processes
import tiny
import torch
from safetensors.torch import load_file

import fmdistill
from fmdistill import cache, cli, distill, evaluate, export, pipeline, report, teachers
from fmdistill import recipe as recipes
from fmdistill.distill import checkpoint, tasks
from fmdistill.distill import student as students
from fmdistill.export.card import write_card
from fmdistill.export.source import FinishedRun
from fmdistill.files import write_whole
from fmdistill.pipeline import bench, compare, plan, side_by_side, variants
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.report import paired, rows
from fmdistill.stages import by_stage, last_stage, saved_stages

CHANGES = {  # of the second stage
    "objective.embedding.distance.name": "cosine",
    "objective.embedding.weighting.name": "uniform",
    "optimizer.lr": "0.001",
    "train.steps": "6",
}
STAGES = "\n".join(
    [
        "protocols: [eval/cosine.yaml]",
        "stages:",
        "  features: {}",
        "  refine:",
        *(f"    {name}: {value}" for name, value in CHANGES.items()),
        "",
    ]
)
SET = [f"{name}={value}" for name, value in CHANGES.items()]
STEPS = 12 + 6


def write(folder: Path) -> Path:
    """Write a recipe of two stages into `folder`."""
    write_whole(folder / "staged.yaml", tiny.RECIPE.format(folder=folder) + STAGES)  # both processes of a launcher do
    return folder / "staged.yaml"


def load(folder: Path, *overrides: str) -> Recipe:
    return recipes.load(write(folder), overrides)


def weights(run: str | Path) -> bytes:
    return (Path(run) / "student.safetensors").read_bytes()


def logged(run: str | Path) -> list[dict]:
    return processes.rows(Path(run))


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory, toy_cache) -> tuple[Path, Path]:
    """The runs of two recipes, of which the second begins with the student of the first."""
    folder = tmp_path_factory.mktemp("by_hand")
    (folder / "cache").symlink_to(toy_cache)
    first = distill.run(tiny.load(folder, f"out={folder}/first"))
    second = distill.run(tiny.load(folder, f"out={folder}/second", f"student.pretrained={first}", *SET))
    assert weights(first) != weights(second)
    return first, second


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy_cache) -> Path:
    """A folder with a finished run of two stages, evaluated."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "cache").symlink_to(toy_cache)
    pipeline.run(load(folder))
    return folder


def test_two_stages_are_two_runs_by_hand(finished, by_hand):
    for run, alone in zip((finished / "run/features", finished / "run"), by_hand, strict=True):
        assert weights(run) == weights(alone) and logged(run) == logged(alone)
    assert {path.name for path in (finished / "run").iterdir()} == {
        *("recipe.yaml", "stages.yaml", "features", "metrics.jsonl", "student.safetensors", "checkpoints"),
        "evaluation",
    }


def test_each_run_has_the_recipe_of_its_stage_and_the_last_one_is_the_recipe_s(finished):
    recipe = load(finished)
    stages = by_stage(recipe)
    assert list(stages) == ["features", "refine"] and last_stage(recipe) == stages["refine"]
    assert recipes.load_saved(finished / "run/features", ["trust=true"]) == stages["features"]
    assert recipes.load_saved(finished / "run", ["trust=true"]) == stages["refine"]
    assert saved_stages(finished / "run") == recipe and saved_stages(finished / "run/features") is None
    refine = stages["refine"]
    assert (refine.train.steps, refine.optimizer["lr"], refine.student["pretrained"]) == (
        6,
        0.001,
        f"{finished}/run/features",
    )
    assert refine.objective["embedding"]["weighting"] == {"name": "uniform"}  # another name drops the old settings
    assert (refine.images, refine.cache, refine.teacher) == (recipe.images, recipe.cache, recipe.teacher)
    assert by_stage(tiny.load(finished)) == {"": tiny.load(finished)}


class Killed(Exception):
    pass


@pytest.mark.parametrize("end", [5, 12, 13, 15])  # in the first stage, before the first step of the second, and in it
def test_a_run_stopped_in_any_stage_resumes_to_the_same_weights(cached, by_hand, monkeypatch, end):
    recipe, original, calls = load(cached), torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == end + 1:
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(Killed):
            distill.run(recipe)
    assert (cached / "run/features/student.safetensors").exists() == (end >= 12)
    assert not (cached / "run/student.safetensors").exists()
    if end < 12:
        with pytest.raises(
            UserError, match="its last stage has not begun; `fmdistill distill .*/run/stages.yaml` cont"
        ):
            fmdistill.load(cached / "run", trust=True)
    before = (cached / "run/features/metrics.jsonl").stat().st_mtime_ns
    distill.run(recipe)
    assert [weights(cached / "run/features"), weights(cached / "run")] == [weights(run) for run in by_hand]
    assert logged(cached / "run") == logged(by_hand[1])
    again = (cached / "run/features/metrics.jsonl").stat().st_mtime_ns
    assert (again == before) == (end >= 12)  # a finished stage is not touched


def test_the_saved_recipe_of_the_last_stage_continues_it_too(cached, by_hand, monkeypatch):
    build = tasks.build

    def failing(recipe):
        if (cached / "run/features" / students.WEIGHTS).exists():
            raise Killed
        return build(recipe)

    with monkeypatch.context() as patched:
        patched.setattr(tasks, "build", failing)
        with pytest.raises(Killed):
            distill.run(load(cached))
    run = distill.run(recipes.load(cached / "run/recipe.yaml", ["trust=true"]))
    assert weights(run) == weights(by_hand[1])
    assert distill.run(load(cached)) == run


@pytest.mark.parametrize("stage", ["run/features", "run"])
def test_a_kill_between_the_last_step_of_a_stage_and_its_student_loses_nothing(cached, by_hand, monkeypatch, stage):
    recipe, save = load(cached), checkpoint.save_state

    def failing(state, path):
        if path == cached / stage / students.WEIGHTS:
            raise Killed
        save(state, path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_state", failing)
        with pytest.raises(Killed):
            distill.run(recipe)
    distill.run(recipe)
    assert [weights(cached / "run/features"), weights(cached / "run")] == [weights(run) for run in by_hand]


def test_all_stages_need_one_teacher_pass_and_a_finished_run_does_nothing(tmp_path, monkeypatch, caplog):
    built, build = [], teachers.build
    monkeypatch.setattr(teachers, "build", lambda settings: built.append(settings["name"]) or build(settings))
    with caplog.at_level(logging.INFO, logger="fmdistill"):
        rows_of_run = pipeline.run(load(tmp_path))
    assert len(built) == 1 and sum("images cached" in line for line in caplog.messages) == 1
    assert list(rows_of_run) == ["eval/cosine.yaml"]
    monkeypatch.setattr(tasks, "build", lambda recipe: pytest.fail("trains again"))
    assert pipeline.run(load(tmp_path)) == rows_of_run
    shutil.rmtree(tmp_path / "run/features")  # to save space
    assert pipeline.run(load(tmp_path)) == rows_of_run and not (tmp_path / "run/features").exists()


def test_the_folder_is_a_run_for_everything_that_takes_one(finished, by_hand, tmp_path, capsys):
    run = finished / "run"
    student = distill.load_student(run, trust=True).state_dict()
    assert all(torch.equal(value, student[name]) for name, value in load_file(by_hand[1] / students.WEIGHTS).items())
    stored = {name: evaluate.run("eval/cosine.yaml", name, ["trust=true"]) for name in (run, run / "features")}
    assert stored[run] != stored[run / "features"]
    assert stored[run] == evaluate.run("eval/cosine.yaml", by_hand[1], ["trust=true"])
    of_file = evaluate.run("eval/cosine.yaml", by_hand[1] / students.WEIGHTS, [f"recipe={write(finished)}"])
    assert of_file == stored[run]
    assert cli.main(["evaluate", str(write(finished))]) == 0 and "cosine" in capsys.readouterr().out
    half = export.run(str(run), "half", str(tmp_path / "half.safetensors"), True)
    assert torch.equal(load_file(half)["net.3.bias"], student["net.3.bias"].half())
    predictor = fmdistill.load(run, trust=True)
    predictor.set_image(torch.zeros(48, 64, 3, dtype=torch.uint8).numpy())
    (tmp_path / "exported").mkdir()
    card = write_card(tmp_path / "exported", FinishedRun.of(run, trust=True), {}).read_text()
    assert "Stage `features`:" in card and "| Length | 12 steps of 8 images |" in card
    assert "Stage `refine`:" in card and "| Length | 6 steps of 8 images |" in card


def test_one_report_has_the_curves_of_every_stage_and_the_results_of_the_last(finished, tmp_path):
    (read,) = rows.read_runs([finished / "run"])
    assert list(read.stages) == ["features", "refine"] and read.stages["refine"] is read
    steps = {name: [row["step"] for row in log if "loss" in row] for name, log in read.curves().items()}
    assert steps == {"run, features": list(range(1, 13)), "run, refine": list(range(13, STEPS + 1))}
    (plain,) = rows.read_runs([finished / "run/features"])
    assert plain.curves() == {"features": plain.log} == {"features": read.stages["features"].log}
    shown = report.run([str(finished / "run")], str(tmp_path / "report")).read_text()
    assert "stages features, refine" in shown and "one line per run and stage" in shown
    assert "| run" in report.text([str(finished / "run")]) or "run " in report.text([str(finished / "run")])


def test_the_seconds_and_weights_of_a_comparison_are_those_of_all_stages(finished):
    (read,) = rows.read_runs([finished / "run"])
    seconds = [
        steps * 8 / read.stages[name].log[-2]["images_per_second"] for name, steps in (("features", 12), ("refine", 6))
    ]
    assert paired._seconds(read) == pytest.approx(sum(seconds))
    sizes = [
        row["embedding/effective_sample_size"] for stage in read.stages.values() for row in stage.log if "loss" in row
    ]
    assert len(sizes) == STEPS and paired._effective_sample_size([read]) == pytest.approx(sum(sizes) / STEPS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages={}"], "stages: 0 named; name two or more"),
        (["stages.refine=null"], "stages: 1 named; name two or more"),
        (["stages.refine.images.limit=3"], "stages.refine.images: all stages have the recipe's `images`; set it there"),
        (["stages.refine.teacher.batch=3"], "stages.refine.teacher: all stages have the recipe's `teacher`"),
        (["stages.features.cache.codec=fp32"], "stages.features.cache: all stages have the recipe's `cache`"),
        (["stages.refine.out=x"], "stages.refine.out: all stages have the recipe's `out`"),
        (["stages.refine.seed=1"], "stages.refine.seed: all stages have the recipe's `seed`"),
        (["stages.refine.protocols=[]"], "stages.refine.protocols: all stages have"),
        (["stages.refine.optimiser.lr=1"], "stages.refine.optimiser: no such setting.* Did you mean 'optimizer'"),
        (["stages.refine.train.stepz=1"], "stages.refine.train.stepz: no such setting.* Did you mean 'steps'"),
        (["stages.refine.train.steps=0"], "stages.refine.train.steps=0, train.epochs=None: expected more than 0"),
        (["stages.refine.optimizer.lrr=1"], "stages.refine.optimizer.lrr: no such setting"),
        (["stages.refine.task.name=nothing"], "stages.refine.task.name: unknown name 'nothing'"),
        (
            ["stages.refine.objective.embedding.distance.name=ms"],
            "stages.refine.objective.embedding.distance.name: unk",
        ),
        (["stages.refine.objective.embedding=null"], "stages.refine.objective"),
        (["stages.refine.schedule.name=steps", "stages.refine.schedule.milestones=[2]"], "stages.refine.schedule"),
        (
            ["stages.refine.train.batch_size=100"],
            "stages.refine.train.batch_size=100: there are only 24 training images",
        ),
        (["stages.refine.train.accumulate=3"], "stages.refine.train.batch_size=8: not divisible by 1 processes"),
        (["stages.refine.train.device=tpu"], "stages.refine.train.device"),
        (["stages.refine.student.pretrained=x/y"], "stages.refine.student.pretrained=x/y: this stage begins with the"),
        (["stages.refine.student.name=resnet20"], "stages.refine.student.name=resnet20: all stages train the recipe's"),
        (["student.pretrained=no/where"], "student.pretrained=no/where: no such file or finished run"),
        (["stages.features.student.pretrained=no/where"], "stages.features.student.pretrained=no/where: no such file"),
        (["stages.evaluation.train.steps=3"], "stages.evaluation: names a folder in the run"),
        (["stages.checkpoints.train.steps=3"], "stages.checkpoints: names a folder in the run"),
        (["stages.Third.train.steps=3"], "stages.Third: names a folder in the run; use lower-case letters"),
        (["stages.refine=3"], "stages.refine"),
        (["train.device=tpu"], r"^train\.device"),
        (["teacher.batch=x"], r"^teacher\.batch"),
    ],
)
def test_a_wrong_stage_is_refused_before_anything_is_spent(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr(teachers, "build", lambda settings: pytest.fail("a teacher is built"))
    with pytest.raises(UserError, match=message):
        pipeline.run(load(tmp_path, *overrides))
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_several_teachers_have_no_stages(tmp_path):
    with pytest.raises(UserError, match="stages: a recipe of several `teachers` is trained in one"):
        pipeline.check(recipes.load("recipes/several/mini.yaml", ["stages.a.train.steps=1", "stages.b.train.steps=1"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.refine.student.freeze=[nothing]", "stages.refine.student.freeze: nothing is called 'nothing'"),
        ("stages.refine.task.name=classify", "stages.refine: student.name=tiny:Student: task classify trains a clas"),
    ],
)
def test_what_only_building_a_later_stage_shows_is_raised_before_the_first_one_is_trained(cached, override, message):
    with pytest.raises(UserError, match=message):
        distill.run(load(cached, override))
    assert not (cached / "run/features").exists()


def test_settings_of_the_recipe_are_those_of_the_stages_that_do_not_set_them(tmp_path):
    def settings(*overrides: str) -> list[tuple]:
        stages = by_stage(load(tmp_path, *overrides)).values()
        return [
            (stage.train.steps, stage.train.epochs, stage.train.batch_size, stage.train.accumulate) for stage in stages
        ]

    assert settings("train.steps=4") == [(4, None, 8, 1), (6, None, 8, 1)]
    assert settings("stages.refine.train.steps=2") == [(12, None, 8, 1), (2, None, 8, 1)]
    assert settings("stages.refine.train.epochs=2") == [(12, None, 8, 1), (None, 2.0, 8, 1)]
    assert settings("train.epochs=3") == [(None, 3.0, 8, 1), (6, None, 8, 1)]
    assert settings("train.batch_size=auto") == [(12, None, 8, "auto"), (6, None, 8, "auto")]
    assert settings("stages.refine.train.batch_size=auto") == [(12, None, 8, 1), (6, None, 8, "auto")]
    assert settings("train.batch_size=4", "stages.refine.train.batch_size=2") == [(12, None, 4, 1), (6, None, 2, 1)]
    assert settings("stages=null") == [(12, None, 8, 1)]
    other = ["stages.refine.objective.embedding=null", "stages.refine.objective.more.distance.name=mse"]
    kept = by_stage(load(tmp_path, *other, "stages.refine.objective.more.weighting.name=uniform"))
    assert list(kept["features"].objective) == ["embedding"] and list(kept["refine"].objective) == ["more"]


def test_parts_that_memory_decides_are_chosen_in_each_stage(cached, by_hand):
    for _ in range(2):  # the second time there is nothing to do
        distill.run(load(cached, "train.batch_size=auto"))
    for run, alone in zip((cached / "run/features", cached / "run"), by_hand, strict=True):
        assert recipes.load_saved(run, ["trust=true"]).train.accumulate == 1 and weights(run) == weights(alone)


def test_a_third_stage_begins_with_the_second(cached):
    more = ["stages.polish.train.steps=2", "stages.polish.student.freeze=[net.0]", "train.steps=2"]
    run = distill.run(load(cached, *more, "stages.refine.train.steps=2"))
    assert recipes.load_saved(run, ["trust=true"]).student["pretrained"] == f"{run}/refine"
    states = [load_file(folder / students.WEIGHTS) for folder in (run / "features", run / "refine", run)]
    assert not torch.equal(states[0]["net.0.weight"], states[1]["net.0.weight"])
    assert torch.equal(states[1]["net.0.weight"], states[2]["net.0.weight"])
    assert not torch.equal(states[1]["net.3.weight"], states[2]["net.3.weight"])


def test_a_first_stage_may_begin_with_another_run(cached, by_hand):
    run = distill.run(load(cached, f"student.pretrained={by_hand[1]}", "stages.features.optimizer.lr=1e-9"))
    starts = [recipes.load_saved(folder, ["trust=true"]).student["pretrained"] for folder in (run / "features", run)]
    assert starts == [str(by_hand[1]), f"{run}/features"]
    first, start = (load_file(folder / students.WEIGHTS) for folder in (run / "features", by_hand[1]))
    torch.testing.assert_close(first["net.0.weight"], start["net.0.weight"], rtol=0, atol=1e-5)


class OwnStart(tiny.Student):
    """A student whose builder loads files itself, as TinyViT's do, and knows no runs."""

    def __init__(self, pretrained: str = "none") -> None:
        super().__init__()
        if pretrained != "none":
            self.load_state_dict(load_file(pretrained))


def test_a_student_that_loads_files_itself_begins_with_a_run_too(cached, by_hand):
    run = distill.run(load(cached, "student.name=test_stages:OwnStart", "student.pretrained=none"))
    assert [weights(run / "features"), weights(run)] == [weights(alone) for alone in by_hand]


def test_a_changed_setting_of_a_stage_that_was_begun_is_refused_by_its_name(cached, monkeypatch):
    build = tasks.build

    def failing(recipe):
        if (cached / "run/features" / students.WEIGHTS).exists():
            raise Killed
        return build(recipe)

    with monkeypatch.context() as patched:
        patched.setattr(tasks, "build", failing)
        with pytest.raises(Killed):
            distill.run(load(cached))
    with pytest.raises(UserError, match=r"run/features: holds a run of another recipe: seed is 0 in the run and 1 in"):
        pipeline.run(load(cached, "seed=1"))
    with pytest.raises(UserError, match=r"stages\.features: .*run/features: holds .* train\.steps is 12 .* and 7"):
        distill.run(load(cached, "stages.features.train.steps=7"))
    with pytest.raises(
        UserError, match="run: holds a run of the stages features, refine, and the recipe has first, re"
    ):
        renamed = load(cached)
        distill.run(dataclasses.replace(renamed, stages={"first": {}, "refine": (renamed.stages or {})["refine"]}))
    with pytest.raises(UserError, match="holds a run of the stages features, refine, and the recipe has no stages"):
        distill.run(load(cached, "stages=null"))
    distill.run(load(cached, "stages.refine.train.steps=3"))  # which was not begun
    with pytest.raises(UserError, match=r"stages\.refine: .*/run: holds .* train\.steps is 3 in the run and 6 in"):
        pipeline.evaluate_recipe(load(cached))
    with pytest.raises(UserError, match="already holds a run"):
        distill.run(load(cached, "stages.refine.train.steps=3"), resume=False)
    assert distill.run(load(cached, "stages.refine.train.steps=3", "train.log_every=5")).name == "run"


def test_a_run_that_was_moved_continues(cached, by_hand, monkeypatch):
    original, calls = torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 18:
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(Killed):
            distill.run(load(cached))
    (cached / "run").rename(cached / "moved")
    run = distill.run(load(cached, f"out={cached}/moved"))
    assert weights(run) == weights(by_hand[1])
    distill.run(recipes.load(run / "stages.yaml", ["trust=true"]))
    with pytest.raises(UserError, match="stages.yaml: names code outside fmdistill .*tiny:Student"):
        recipes.load(run / "stages.yaml")


def test_a_saved_recipe_cannot_hide_code_in_a_stage(tmp_path):
    write_whole(tmp_path / "stages.yaml", "stages: {a: {task.name: 'os:remove'}}\n")
    with pytest.raises(UserError, match="names code outside fmdistill .os:remove."):
        recipes.load(tmp_path / "stages.yaml")


STUDY = """
extends: {folder}/tiny.yaml
out: {folder}/study
train: {{steps: 4}}
protocols: [eval/cosine.yaml]
methods:
  once: {{}}
  twice: {{stages: {{features: {{}}, refine: {{optimizer.lr: 0.001, train.steps: 3}}}}}}
"""


def study(folder: Path) -> str:
    tiny.write(folder)
    (folder / "study").mkdir(exist_ok=True)
    write_whole(folder / "study/study.yaml", STUDY.format(folder=folder))
    return str(folder / "study")


def test_a_method_of_a_study_may_have_stages(cached):
    name = study(cached)
    table = compare.run([name, f"{name}:twice,stages.refine.train.steps=2"], 2, ["train.log_every=2"])
    lines = json.loads(table.with_suffix(".json").read_text())["cosine"]
    assert list(dict.fromkeys(line["method"] for line in lines)) == ["once", "twice", "twice, steps=2"]
    for seed in (0, 1):
        once, twice = (cached / "study" / method / f"seed-{seed}" for method in ("once", "twice"))
        assert weights(once) == weights(twice / "features") != weights(twice)
        assert recipes.load_saved(twice, ["trust=true"]).seed == seed
        assert recipes.load_saved(twice, ["trust=true"]).train.steps == 3
    line = next(line for line in lines if line["method"] == "twice" and line["metric"] == "cosine")
    stored = [json.loads((cached / f"study/twice/seed-{s}/evaluation/cosine.json").read_text())["rows"] for s in (0, 1)]
    values = [evaluate.results.value(judged, "cosine") for judged in stored]
    assert line["mean"] == pytest.approx(sum(values) / 2)


def test_methods_of_equal_stages_and_settings_without_effect_are_refused(tmp_path):
    name = study(tmp_path)
    twice = recipes.load(f"{name}:twice")
    renamed = dict(zip("ab", (twice.stages or {}).values(), strict=True))
    other = dataclasses.replace(twice, stages=renamed, out=f"{tmp_path}/other")
    with pytest.raises(UserError, match="other: trains the same student as twice"):
        variants.check_distinct({"twice": twice, "other": other})
    with pytest.raises(UserError, match="train.steps=9: changes nothing"):
        both = f"{name}:twice,stages.features.train.steps=2,train.steps=9"
        variants.check_distinct({both: recipes.load(both)})
    with pytest.raises(UserError, match=r"study:once: stages: 1 named"):
        compare.run([name], 1, ["stages.refine.train.steps=2"])
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_runs_of_stages_side_by_side_are_those_of_one_after_the_other(cached, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", f"{processes.TESTS}:{processes.TESTS.parent}")
    name = study(cached)
    compare.run([name], 1, [f"out={cached}/jobs"], jobs=2)
    twice = recipes.load(f"{name}:twice", [f"out={cached}/jobs/twice/seed-0"])
    assert side_by_side.is_trained(twice) and side_by_side.last_step(twice) == 4 + 3
    alone = distill.run(dataclasses.replace(twice, out=f"{cached}/alone"))
    for stage in ("features", "."):
        one, other = (load_file(Path(run) / stage / students.WEIGHTS) for run in (twice.out, alone))
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_plan_has_the_steps_of_every_stage_and_writes_nothing(tmp_path):
    recipe = load(tmp_path, "train.epochs=5", "stages.refine.train.batch_size=6")
    before = sorted(tmp_path.rglob("*"))
    estimate = plan.run(recipe, plan.PlanSettings(images=6, steps=1, gpus=[1, 4]))
    assert sorted(tmp_path.rglob("*")) == before
    assert {name: training.steps for name, training in estimate.training.items()} == {"features": 15, "refine": 6}
    hours = [training.steps * training.seconds / 3600 for training in estimate.training.values()]
    assert estimate.training_hours == pytest.approx(sum(hours)) and estimate.steps == 21
    shown = plan.text(estimate, "staged.yaml").splitlines()
    assert [line for line in shown if line.startswith("stage features ") and "15 steps" in line]
    assert [line for line in shown if line.startswith("stage refine") and "of 6 images, 6 steps" in line]
    assert [line for line in shown if line.startswith("| 4 |") and "train.batch_size=6 is not divisible by 4" in line]


def test_a_bench_measures_the_training_of_the_first_stage(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(bench, "measure_training", lambda recipe, *args: measured.append(recipe.train.steps) or [])
    made = bench.run(load(tmp_path), bench.BenchSettings(images=1, rounds=1, megabytes=0.05, steps=1))
    assert measured == [12] and "Training is that of the stage features." in bench.text(made)
    assert (tmp_path / "run/bench.json").is_file()


def test_verbs_that_describe_name_the_stages(tmp_path, capsys):
    assert cli.main(["show", str(write(tmp_path)), "stages.refine.train.steps=2"]) == 0
    (tmp_path / "shown.yaml").write_text(shown := capsys.readouterr().out)
    assert by_stage(recipes.load(tmp_path / "shown.yaml"))["refine"].train.steps == 2 and "stages:" in shown
    assert cli.main(["explain", str(write(tmp_path))]) == 0
    assert "Stages: features, refine" in capsys.readouterr().out
    assert cli.main(["check", str(write(tmp_path))]) == 0
    assert cli.main(["explain", "stages"]) == 0 and "one after the other" in capsys.readouterr().out


def test_python_runs_stages_and_its_overrides_reach_them(cached):
    result = fmdistill.run(write(cached), {"stages.refine.train.steps": 2, "train": {"steps": 3}}, seed=4)
    read = {name: run.recipe for name, run in rows.read_runs([result.out])[0].stages.items()}
    assert {name: (recipe.train.steps, recipe.seed) for name, recipe in read.items()} == {
        "features": (3, 4),
        "refine": (2, 4),
    }
    again = fmdistill.run(recipes.load(cached / "run/stages.yaml", ["trust=true"]))
    assert again.rows == result.rows


def test_a_folder_of_a_run_is_checked_by_its_stages(finished):
    saved = f"{finished}/run/stages.yaml"
    assert pipeline.check_files([str(finished / "run")], ["trust=true"]) == [saved]


TWO = ["student.name=test_distill_processes:Still", "train.accumulate=2", "images.validation=1"]


@pytest.mark.slow
def test_two_processes_train_all_stages_as_one_does(tmp_path):
    cache.run(load(tmp_path, *TWO))
    done = processes.torchrun(tmp_path, script=__file__)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = distill.run(load(tmp_path, *TWO, f"out={tmp_path}/alone", "train.accumulate=1"))
    for stage in ("features", "."):
        one, two = (load_file(run / stage / students.WEIGHTS) for run in (alone, tmp_path / "run"))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)
        assert [row["step"] for row in logged(tmp_path / "run" / stage)] == [
            row["step"] for row in logged(alone / stage)
        ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    distill.run(load(Path(sys.argv[1]), *TWO))
    assert torch.distributed.get_world_size() == 2
    torch.distributed.destroy_process_group()
