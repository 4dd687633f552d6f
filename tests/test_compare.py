"""`fmdistill compare`: the same seeds for every recipe from one cache, continued where it stopped."""

import json
import logging

import pytest
import toy_digits

from fmdistill import cli, distill, evaluate, pipeline
from fmdistill.evaluate import top1
from fmdistill.evaluate.results import value
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


def test_a_comparison_caches_once_pairs_its_seeds_and_continues(recipes, caplog, monkeypatch, capsys):
    folder, both = recipes
    trained, judged = [], []
    run, judge = distill.run, evaluate._call

    def counted(settings, *args):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(settings.out)
        return run(settings, *args)

    monkeypatch.setattr(pipeline.distill, "run", counted)
    monkeypatch.setattr(evaluate, "_call", lambda *args: judged.append(args[3].parent.parent) or judge(*args))
    with caplog.at_level(logging.INFO, logger="fmdistill"):
        with pytest.raises(KeyboardInterrupt):
            pipeline.compare(both, 2, QUICK)
        assert sum("images cached" in line for line in caplog.messages) == 1
        first = {
            path: (folder / path / "student.safetensors").stat().st_mtime_ns for path in ("plain/seed-0", "rare/seed-0")
        }
        monkeypatch.setattr(pipeline.distill, "run", run)
        assert cli.main(["compare", *both, "--seeds", "2", *QUICK]) == 0
    assert sum("images cached" in line for line in caplog.messages) == 1  # one teacher pass in all
    assert all((folder / path / "student.safetensors").stat().st_mtime_ns == time for path, time in first.items())
    assert [str(one) for one in judged] == [f"{folder}/{m}/seed-{s}" for s in (0, 1) for m in ("plain", "rare")]
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
    out = pipeline.compare(both, 1, QUICK).parent / "plain/seed-0"
    kept = json.loads((out / "evaluation/top1.json").read_text())
    rows, images = kept["rows"], [image for image in kept["images"] if image["subject"] == "student"]
    assert len(images) == 60
    judged: list[object] = []
    call = evaluate._call
    monkeypatch.setattr(evaluate, "_call", lambda *args: judged.append(args) or call(*args))
    assert evaluate.run(folder / "top1.yaml", out) == rows and not judged
    assert value(rows, "top1") == pytest.approx(sum(i["label"] == i["prediction"] for i in images) / 60)
    assert value(rows, "top1", "teacher") > 0.5
    quarters = [value(rows, "top1", quartile=f"q{n}") for n in range(1, 5)]
    assert sum(quarters) / 4 == pytest.approx(value(rows, "top1"))  # 60 images make four equal quarters
    # Of 120 training digits, 12 classes' counts are 11 to 13: many is above 12, few below 11, and nothing else is left.
    assert "medium" in {row.get("frequency") for row in rows}
    assert sum(row["count"] for row in rows if "frequency" in row and row["metric"] == "top1") == 2 * 60
    (folder / "top1.yaml").write_text(toy_digits.TOP1.replace("quartiles: true", "quartiles: false"))
    evaluate.run(folder / "top1.yaml", out)
    assert len(judged) == 1  # by another protocol
    (folder / "top1.yaml").write_text(toy_digits.TOP1)


def test_what_cannot_be_compared_is_said(recipes):
    folder, both = recipes
    with pytest.raises(UserError, match="give two recipes"):
        pipeline.compare(both[:1] * 2, 2)
    with pytest.raises(UserError, match="two recipes write to one folder"):
        pipeline.compare(both, 2, [f"out={folder}/same"])
    other = folder / "other.yaml"
    other.write_text(f"extends: {both[0]}\nout: {folder}/other\nprotocols: []\n")
    with pytest.raises(UserError, match="different protocols, or none"):
        pipeline.compare([both[0], str(other)], 2)
    wrong = folder / "hundred.yaml"
    wrong.write_text(toy_digits.TOP1 + "classes: 100\n")
    out = pipeline.compare(both, 1, QUICK).parent / "plain/seed-0"
    with pytest.raises(UserError, match="classes=100, but .* tells 10 apart"):
        evaluate.run(wrong, out)
    with pytest.raises(UserError, match="0 < few <= many"):
        top1.Top1(few=0)
