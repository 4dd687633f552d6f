"""What an evaluation stores and reuses, and its errors for custom evaluators and unsuitable students."""

import dataclasses
import html
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from fmdistill import cache, distill, evaluate, recipe, report, stop
from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate import grid_miou
from fmdistill.evaluate.results import Metric, row
from fmdistill.registry import UserError, resolve
from fmdistill.report import rows


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A folder with a finished toy run and two protocol files of one evaluator, not yet judged."""
    folder = tmp_path_factory.mktemp("evaluate")
    loaded = tiny.load(folder, "train.steps=1")
    cache.run(loaded)
    distill.run(loaded)
    (folder / "full.yaml").write_text("name: grid_miou\ngrids: [5]\nimages: 2\nfloors: true\n")
    (folder / "short.yaml").write_text("name: grid_miou\ngrids: [5]\nimages: 1\n")
    return folder


def test_a_real_evaluation_stands_beside_the_paper_s_table(ran):
    for name in ("full", "short"):
        evaluate.run(ran / f"{name}.yaml", ran / "run", ["trust=true"])
    stored = json.loads((ran / "run/evaluation/short.json").read_text())
    assert stored["protocol"]["name"] == "grid_miou" and stored["protocol"]["images"] == 1
    (run,) = rows.read_runs([ran / "run"])
    assert {stem: result.protocol["name"] for stem, result in run.evaluations.items()} == {
        "full": "grid_miou", "short": "grid_miou",
    }  # fmt: skip
    assert run.evaluations["short"].protocol == stored["protocol"] and run.evaluations["short"].rows == stored["rows"]
    assert {row.name for row in rows.rows([run], "full")} > {row.name for row in rows.rows([run], "short")}
    sections = report.text([str(ran / "run")]).split("\nshort\n")
    assert len(sections) == 2
    for text in sections:
        assert "ACCV 2024" in text and "MobileSAM + SRW 73.33" in " ".join(text.split())


def test_an_interrupted_evaluation_resumes_with_the_remaining_images(ran, monkeypatch):
    (ran / "all.yaml").write_text("name: grid_miou\ngrids: [3, 4]\nfloors: true\nby_size: true\nwrite_masks: true\n")
    whole = evaluate.run(ran / "all.yaml", ran / "run", ["trust=true"])
    path = ran / "run/evaluation/all.json"
    expected = [json.loads(file.read_text()) for file in (path, path.with_suffix(".masks.json"))]
    judge, judged = grid_miou._judge, []

    def interrupted(protocol, head, case, *rest):
        judged.append(case.image)
        if len(judged) in (3, 6):
            raise stop.Stopped(15)
        return judge(protocol, head, case, *rest)

    monkeypatch.setattr(grid_miou, "_judge", interrupted)
    path.unlink()
    for done in (2, 4):
        with pytest.raises(stop.Stopped):
            evaluate.run(ran / "all.yaml", ran / "run", ["trust=true"])
        assert not path.exists()
        partial = path.with_suffix(".partial.jsonl").read_text()
        assert len(partial.splitlines()) == 1 + done
        path.with_suffix(".partial.jsonl").write_text(partial + '{"image": "half wri')  # as a killed process leaves it
    assert evaluate.run(ran / "all.yaml", ran / "run", ["trust=true"]) == whole
    assert [json.loads(file.read_text()) for file in (path, path.with_suffix(".masks.json"))] == expected
    assert len(judged) == 8 + 2 and not path.with_suffix(".partial.jsonl").exists()


def test_partial_results_of_another_protocol_are_not_used(ran, monkeypatch):
    (ran / "cut.yaml").write_text("name: grid_miou\ngrids: [2]\n")
    monkeypatch.setattr(grid_miou.stop, "check", StopAfter(2))
    with pytest.raises(stop.Stopped):
        evaluate.run(ran / "cut.yaml", ran / "run", ["trust=true"])
    monkeypatch.undo()
    (ran / "cut.yaml").write_text("name: grid_miou\ngrids: [3]\n")
    rows = evaluate.run(ran / "cut.yaml", ran / "run", ["trust=true"])
    assert {row["grid"] for row in rows if row["metric"] == "miou"} == {"3x3"}


class StopAfter:
    """A replacement of `stop.check` that raises Stopped after `calls` calls."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise stop.Stopped(15)


def test_a_result_is_recomputed_if_the_weights_or_the_protocol_changed(ran, monkeypatch):
    calls, call = [], evaluate._call
    monkeypatch.setattr(evaluate, "_call", lambda *given: calls.append(1) or call(*given))
    (ran / "again.yaml").write_text("name: grid_miou\ngrids: [2]\n")
    first = evaluate.run(ran / "again.yaml", ran / "run", ["trust=true"])
    assert evaluate.run(ran / "again.yaml", ran / "run", ["trust=true"]) == first and len(calls) == 1
    student = ran / "run/student.safetensors"
    weights = student.read_bytes()
    state = {name: value + 0.5 for name, value in load_file(student).items()}
    save_file(state, student)
    assert evaluate.run(ran / "again.yaml", ran / "run", ["trust=true"]) != first and len(calls) == 2
    student.write_bytes(weights)
    assert evaluate.run(ran / "again.yaml", ran / "run", ["trust=true"]) == first and len(calls) == 3
    assert evaluate.run(ran / "again.yaml", ran / "run", ["trust=true", "grids=[3]"]) != first and len(calls) == 4


@pytest.mark.parametrize("setting", ["images.limit=4", "images.validation=4", "student.name=test_evaluate:Wide"])
def test_runs_that_see_other_images_or_floors_are_not_judged_together(ran, setting):
    other = ran / setting.partition("=")[0]
    recipe.save(tiny.load(ran, "train.steps=1", f"out={other}", setting), other)
    with pytest.raises(UserError, match="differ; evaluate them one by one") as caught:
        evaluate.run_together(ran / "short.yaml", [ran / "run", other], trust=True)
    assert setting.partition(".")[0] in str(caught.value)


@dataclass(frozen=True)
class WithoutJudge:
    size: int = 1


class NoDataclass:
    pass


@dataclass(frozen=True)
class SizeEvaluator:
    size: int = 1

    def judge(self, recipe, students):
        return [row(name, "size", self.size) for name in students], {}


@dataclass(frozen=True)
class WrongReturn:
    returns: str = "number"

    def judge(self, recipe, students):
        valid = {"subject": "student", "metric": "size", "value": 1.0}
        return {
            "number": 3,
            "no value": ([{"subject": "student", "metric": "size"}], {}),
            "text": ([{**valid, "value": "1"}], {}),
            "twice": ([valid, dict(valid)], {}),
            "clash": ([valid], {"rows": []}),
            "two dimensions": ([valid, {**valid, "k": 1}], {"images": []}),
        }[self.returns]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WithoutJudge", r"WithoutJudge has no method judge\(self, recipe, students\) -> \(rows, details\)"),
        ("NoDataclass", "is a NoDataclass; an evaluator is a dataclass"),
    ],
)
def test_a_custom_evaluator_without_a_judge_is_a_one_line_error(tmp_path, name, message):
    path = tmp_path / "own.yaml"
    path.write_text(f"name: test_evaluate:{name}\n")
    with pytest.raises(UserError, match=message) as caught:
        evaluate.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_custom_evaluator_needs_only_its_name(ran):
    (ran / "own.yaml").write_text("name: test_evaluate:SizeEvaluator\nsize: 3\n")
    expected = [{"subject": "student", "metric": "size", "value": 3.0}]
    assert evaluate.run(ran / "own.yaml", ran / "run", ["trust=true"]) == expected
    stored = json.loads((ran / "run/evaluation/own.json").read_text())
    assert stored["protocol"] == {"name": "test_evaluate:SizeEvaluator", "size": 3}
    (ran / "run/evaluation/own.json").unlink()


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        ("number", r"judge returned int; expected \(rows, details\)"),
        ("no value", "returned the row .*; a row has subject, metric and a number as value"),
        ("text", "a row has subject, metric and a number as value"),
        ("twice", "two rows of student size 1.0000; give one of them another dimension"),
        ("clash", "details named rows"),
        ("two dimensions", None),
    ],
)
def test_the_return_value_of_a_custom_evaluator_is_checked(ran, returns, message):
    (ran / "odd.yaml").write_text(f"name: test_evaluate:WrongReturn\nreturns: {returns}\n")
    if message is None:
        assert len(evaluate.run(ran / "odd.yaml", ran / "run", ["trust=true"])) == 2
        (ran / "run/evaluation/odd.json").unlink()
        return
    with pytest.raises(UserError, match=message) as caught:
        evaluate.run(ran / "odd.yaml", ran / "run", ["trust=true"])
    assert "test_evaluate:WrongReturn" in str(caught.value) and "\n" not in str(caught.value)
    assert not (ran / "run/evaluation/odd.json").exists()


# Right confidence is neither high nor low, and times of two machines are not compared.
NO_VERDICT = {"confidence", "milliseconds", "peak_memory", "count_ratio", "masks", "without_masks"}
NO_VERDICT |= {"bias", "predicted_iou", "real_iou"}


def stated_metrics(kind):
    """Return an evaluator's metrics; those of coco_ap depend on its settings."""
    return kind(truth={"name": "coco"}).metrics if isinstance(kind.metrics, property) else kind.metrics


@pytest.mark.parametrize("name", evaluate.EVALUATORS)
def test_every_evaluator_of_the_registry_states_its_metrics(name):
    kind = resolve(name, evaluate.EVALUATORS, "name")
    assert dataclasses.is_dataclass(kind) and callable(kind.judge) and callable(kind.check)
    for metric_name, metric in stated_metrics(kind).items():
        assert isinstance(metric, Metric) and metric.heading
        assert (metric.better is None) == (metric_name in NO_VERDICT)
        assert metric.help.endswith((".", "")) and (metric.help or not metric.shown)


@pytest.mark.slow
def test_naming_an_evaluator_imports_none():
    names = {reference.partition(":")[0] for reference in evaluate.EVALUATORS.values()}
    script = f"import sys\nfrom fmdistill import evaluate\nassert not {names} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


class Wide(tiny.Student):
    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": super().forward(image)["embedding"].repeat(1, 2, 1, 1)}


class Bare(tiny.Student):
    def forward(self, image: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(image)["embedding"]


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("Wide", r"student gives an embedding of \(64, 4, 4\), the cache holds \(32, 4, 4\)"),
        ("Bare", "Bare: a student's forward returns {'embedding'.*this one a Tensor"),
    ],
)
def test_a_student_with_an_unsuitable_output_is_a_one_line_error(ran, student, message):
    weights = ran / "run/student.safetensors"
    (ran / "other.yaml").write_text((ran / "tiny.yaml").read_text().replace("tiny:Student", f"test_evaluate:{student}"))
    with pytest.raises(UserError, match=message) as caught:
        evaluate.run(ran / "short.yaml", weights, [f"recipe={ran}/other.yaml"])
    assert "\n" not in str(caught.value)


def test_the_paper_s_protocol_ends_on_a_whole_tar_of_sa1b():
    settings = evaluate.load("eval/sam_grid_miou.yaml").evaluator
    assert settings.images == 500 and settings.grids == (5, 16, 32)
    (paper,) = rows.published({"name": "grid_miou"})
    assert "5M" not in paper.setting  # the paper does not say which TinyViT


DOCS = (Path(__file__).parent.parent / "docs/evaluators.md").read_text()


def test_the_example_evaluator_of_the_page_judges_and_is_reported(ran, monkeypatch):
    blocks = dict(reversed(re.findall(r"^```(\w+)\n(.*?)^```", DOCS, re.DOTALL | re.MULTILINE)))
    (source,) = re.findall(r"^```python\n(from dataclasses.*?)^```", DOCS, re.DOTALL | re.MULTILINE)
    assert len([line for line in source.partition("@dataclass")[2].splitlines() if line.strip()]) <= 20
    (ran / "lengths.py").write_text(source)
    (ran / "lengths.yaml").write_text(blocks["yaml"])
    monkeypatch.syspath_prepend(ran)
    rows = evaluate.run(ran / "lengths.yaml", ran / "run", ["trust=true", "images=3"])
    opened = cache.open_cache(tiny.load(ran))
    data, student = CachedImages(opened, "validation"), distill.load_student(ran / "run", trust=True)
    expected = []
    for index in range(3):
        item = tiny.item(data, 0, index)
        with torch.no_grad():
            output = student(opened.preprocess.normalize(item["pixels"][None], item["sizes"][None]))["embedding"][0]
        expected.append(np.linalg.norm(output) / np.linalg.norm(item["outputs"]["sam.embedding"]))
    (result,) = rows
    assert result == {"subject": "student", "metric": "length", "value": pytest.approx(np.mean(expected)), "count": 3}
    assert f"{100 * result['value']:.2f}" in report.text([str(ran / "run")]).partition("lengths")[2]
    assert "the teacher's is 100" in html.unescape(report.run([str(ran / "run")], str(ran / "page")).read_text())
    (ran / "run/evaluation/lengths.json").unlink()


def test_the_page_lists_every_evaluator_with_its_metrics_and_protocols():
    table = {line.split("`")[1]: line for line in DOCS.splitlines() if line.startswith("| `")}
    assert table.keys() == evaluate.EVALUATORS.keys()
    for name, line in table.items():
        for metric in stated_metrics(resolve(name, evaluate.EVALUATORS, "name")):
            known = f"`{metric.removeprefix('boundary_')}`" in line  # boundary AP has every figure of mask AP
            assert known or "as `zeroshot`" in line, f"{name}: {metric}"
