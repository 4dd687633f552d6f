"""Tests of `fmdistill compare`: the same seeds for every recipe from one cache, continued after a stop."""

import json
import logging

import pytest
import toy_digits

from fmdistill import cli, distill, evaluate, recipe
from fmdistill.evaluate import top1
from fmdistill.evaluate.results import value
from fmdistill.pipeline import compare, variants
from fmdistill.registry import UserError

QUICK = ["train.steps=3"]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    toy_digits.trained(folder)
    both = []
    for name, weighting in (("plain", "uniform"), ("rare", "srw")):
        path = folder / f"{name}.yaml"
        objective = f"{{kd: {{weighting: {{name: {weighting}}}}}}}"
        path.write_text(f"extends: {folder}/student.yaml\nout: {folder}/{name}\nobjective: {objective}\n")
        both.append(str(path))
    return folder, both


def test_a_comparison_caches_once_and_continues(recipes, caplog, monkeypatch, capsys):
    folder, both = recipes
    trained, evaluated = [], []
    run, judge = distill.run, evaluate._call

    def counted(settings, *args):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(settings.out)
        return run(settings, *args)

    monkeypatch.setattr(distill, "run", counted)
    monkeypatch.setattr(evaluate, "_call", lambda *args: evaluated.append(args[3].parent.parent) or judge(*args))
    with caplog.at_level(logging.INFO, logger="fmdistill"):
        with pytest.raises(KeyboardInterrupt):
            compare.run(both, 2, QUICK)
        assert sum("images cached" in line for line in caplog.messages) == 1
        first = {
            path: (folder / path / "student.safetensors").stat().st_mtime_ns for path in ("plain/seed-0", "rare/seed-0")
        }
        monkeypatch.setattr(distill, "run", run)
        assert cli.main(["compare", *both, "--seeds", "2", *QUICK]) == 0
    assert sum("images cached" in line for line in caplog.messages) == 1  # one teacher pass in all
    assert all((folder / path / "student.safetensors").stat().st_mtime_ns == time for path, time in first.items())
    assert [str(run_folder) for run_folder in evaluated] == [
        f"{folder}/{m}/seed-{s}" for s in (0, 1) for m in ("plain", "rare")
    ]
    table = capsys.readouterr().out
    assert "**top1**, 2 seeds, differences to plain" in table and f"{folder}/comparison.md" in table
    written = json.loads((folder / "comparison.json").read_text())["top1"]
    for line in written:
        own = [
            json.loads((folder / line["method"] / f"seed-{s}/evaluation/top1.json").read_text())["rows"] for s in (0, 1)
        ]
        values = [value(rows, line["metric"], **line["dimensions"]) for rows in own]
        assert line["mean"] == pytest.approx(sum(values) / 2) and line["seeds"] == 2
    starts = {m: (folder / m / "seed-1/recipe.yaml").read_text() for m in ("plain", "rare")}
    assert all("seed: 1" in text for text in starts.values())


def test_the_accuracy_of_parts_is_that_of_their_images(recipes, monkeypatch):
    folder, both = recipes
    out = compare.run(both, 1, QUICK).parent / "plain/seed-0"
    stored = json.loads((out / "evaluation/top1.json").read_text())
    rows, images = stored["rows"], [image for image in stored["images"] if image["subject"] == "student"]
    assert len(images) == 60
    evaluated: list[object] = []
    call = evaluate._call
    monkeypatch.setattr(evaluate, "_call", lambda *args: evaluated.append(args) or call(*args))
    assert evaluate.run(folder / "top1.yaml", out) == rows and not evaluated
    assert value(rows, "top1") == pytest.approx(sum(i["label"] == i["prediction"] for i in images) / 60)
    assert value(rows, "top1", "teacher") > 0.5
    quarters = [value(rows, "top1", quartile=f"q{n}") for n in range(1, 5)]
    assert sum(quarters) / 4 == pytest.approx(value(rows, "top1"))  # 60 images make four equal quarters
    # Of 120 training digits, 12 classes' counts are 11 to 13: many is above 12, few below 11, and nothing else is left.
    assert "medium" in {row.get("frequency") for row in rows}
    assert sum(row["count"] for row in rows if "frequency" in row and row["metric"] == "top1") == 2 * 60
    (folder / "top1.yaml").write_text(toy_digits.TOP1.replace("quartiles: true", "quartiles: false"))
    evaluate.run(folder / "top1.yaml", out)
    assert len(evaluated) == 1  # since the protocol changed
    (folder / "top1.yaml").write_text(toy_digits.TOP1)


def test_recipes_that_cannot_be_compared_raise(recipes):
    folder, both = recipes
    with pytest.raises(UserError, match="give two recipes"):
        compare.run(both[:1] * 2, 2)
    (folder / "deep").mkdir(exist_ok=True)
    same = folder / "deep/third.yaml"
    same.write_text(f"extends: {both[0]}\nseed: 3\n")
    with pytest.raises(UserError, match="third.yaml: trains the same student as .*/plain.yaml; change one"):
        compare.run([both[0], str(same)], 2)
    same.write_text(f"extends: {both[0]}\noptimizer: {{lr: 0.2}}\n")
    for overrides in ([], [f"out={folder}/elsewhere"]):
        with pytest.raises(UserError, match="/plain.yaml and .*/third.yaml write to the folder .*; give each its own"):
            compare.run([both[0], str(same)], 2, overrides)
    other = folder / "other.yaml"
    other.write_text(f"extends: {both[0]}\nout: {folder}/other\noptimizer: {{lr: 0.3}}\nprotocols: []\n")
    with pytest.raises(UserError, match="different protocols, or none"):
        compare.run([both[0], str(other)], 2)
    wrong = folder / "hundred.yaml"
    wrong.write_text(toy_digits.TOP1 + "classes: 100\n")
    out = compare.run(both, 1, QUICK).parent / "plain/seed-0"
    with pytest.raises(UserError, match="classes=100, but .* has 10 classes"):
        evaluate.run(wrong, out)
    with pytest.raises(UserError, match="0 < few <= many"):
        top1.Top1(few=0)


STUDY = """
extends: {folder}/student.yaml
title: toys
out: {folder}/study
methods:
  kd: {{}}
  hot: {{objective.kd.distance.temperature: 8.0}}
  hot_srw: {{extends: hot, objective.kd.weighting: {{name: srw}}}}
"""


def test_a_study_runs_all_its_methods_and_each_is_a_recipe(recipes, capsys):
    folder, _ = recipes
    study = folder / "toys"
    study.mkdir()
    (study / "study.yaml").write_text(STUDY.format(folder=folder))
    assert cli.main(["compare", str(study), "--seeds", "1", *QUICK]) == 0
    output = capsys.readouterr().out
    assert "differences to kd" in output and "| hot_srw |" in output and f"{folder}/study/comparison.md" in output
    saved = recipe.load_saved(folder / "study/hot_srw/seed-0")
    kd = saved.objective["kd"]
    assert (kd["distance"]["temperature"], kd["weighting"]["name"], saved.title) == (8.0, "srw", "toys, hot_srw")
    before = (folder / "study/hot/seed-0/student.safetensors").stat().st_mtime_ns
    own = f"{study}:hot,objective.kd.weighting.name=soft_poly,objective.kd.weighting.alpha=2"
    table = compare.run([f"{study}:hot", own, f"{study}:kd,optimizer.lr=0.1"], 1, QUICK)
    assert (folder / "study/hot/seed-0/student.safetensors").stat().st_mtime_ns == before  # continued
    variant = "hot-objective.kd.weighting.alpha_2-objective.kd.weighting.name_soft_poly"
    assert (folder / "study" / variant / "seed-0/student.safetensors").is_file()
    assert (folder / "study/kd-optimizer.lr_0.1/seed-0/student.safetensors").is_file()
    methods = [line["method"] for line in json.loads(table.with_suffix(".json").read_text())["top1"]]
    assert list(dict.fromkeys(methods)) == ["hot", "hot, weighting=soft_poly, alpha=2", "kd, lr=0.1"]
    assert cli.main(["evaluate", f"{study}:hot", f"out={folder}/study/hot/seed-0", *QUICK]) == 0
    assert cli.main(["check", str(study), f"{study}:kd,optimizer.lr=0.1", f"{folder}/top1.yaml", *QUICK]) == 0
    checked = ["toys:kd: ok", "toys:hot: ok", "toys:hot_srw: ok", "toys:kd,optimizer.lr=0.1: ok", "top1.yaml: ok"]
    assert [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()[-5:]] == checked
    elsewhere = compare.run([str(study)], 1, [*QUICK, f"out={folder}/elsewhere"])
    assert elsewhere == folder / "elsewhere/comparison.md"
    assert sorted(p.name for p in elsewhere.parent.iterdir() if p.is_dir()) == ["hot", "hot_srw", "kd"]


def test_ambiguous_short_names_are_replaced_by_full_names():
    names = ["a.yaml:train.clip=1", "b/a.yaml:train.clip=1", "a.yaml", "s:m", "s:m,x.name=srw,y=[1,2]"]
    assert variants.short_names(names) == {
        names[0]: names[0], names[1]: names[1], "a.yaml": "a", "s:m": "m", names[4]: "m, x=srw, y=[1,2]"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("objective.kd.distance.temperature=4.0", "temperature=4.0: changes nothing"),  # KD's default
        ("objective.kd.distance.temperature=4", "temperature=4: changes nothing"),
        ("optimizer.lr=5e-2", "optimizer.lr=5e-2: changes nothing"),
        ("train.steps=9,objective.kd.scale=1.0", "objective.kd.scale=1.0: changes nothing"),
        ("train.workers=1", "trains the same student as"),  # affects no weight
        ("objective.kd.weighting={name: uniform}", "changes nothing"),
        ("objective.kd.distance.temprature=2", "temprature: no such setting.* 'temperature'"),
    ],
)
def test_a_variant_without_effect_raises(recipes, settings, says):
    _, both = recipes
    with pytest.raises(UserError, match=says) as error:
        compare.run([both[0], f"{both[0]}:{settings}"], 1)
    assert "\n" not in str(error.value)


def test_a_run_of_another_recipe_raises_before_any_training(recipes, monkeypatch):
    folder, both = recipes
    compare.run(both, 1, QUICK)
    monkeypatch.setattr(distill, "run", lambda *_: pytest.fail("a student is trained"))
    with pytest.raises(UserError, match="seed-0: holds a run of another recipe: .*optimizer.lr"):
        compare.run(both, 2, [*QUICK, "optimizer.lr=0.3"])
