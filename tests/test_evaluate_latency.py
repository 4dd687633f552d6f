"""Sizes and multiply-adds are those of literal formulas; times are medians and quartiles of what the clock says."""

import json
from pathlib import Path

import clip_run
import numpy as np
import pytest
import sam_exports
import tiny
import torch
from nondegenerate import randomize

from fmdistill import cache, distill, evaluate, export
from fmdistill.evaluate import latency, results
from fmdistill.evaluate.latency import Latency
from fmdistill.evaluate.results import value
from fmdistill.export import sam_onnx
from fmdistill.predict import artefact
from fmdistill.predict.onnx_student import open_student
from fmdistill.registry import UserError

CONVOLUTION, LINEAR = 3 * 16 * 8 * 8, 256 * clip_run.DIM  # weights of `clip_run.Student`


def transformer_macs(tokens: int, width: int) -> int:
    """Multiply-adds of a layer: projections of queries, keys and values, attention, its output, and the MLP."""
    return tokens * width * 3 * width + 2 * tokens**2 * width + tokens * width**2 + 2 * tokens * width * 4 * width


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A folder with a toy CLIP's cache and run."""
    folder = tmp_path_factory.mktemp("latency")
    clip_run.write_teacher(folder / "teacher")
    clip_run.write_classes(folder / "train", 1)
    clip_run.write_classes(folder / "val", 1, seed=50)
    recipe = clip_run.load(folder)
    cache.run(recipe)
    clip_run.finish(recipe, randomize(clip_run.Student(), 3))
    return folder


def judged(folder: Path, *overrides: str) -> list[results.Row]:
    return evaluate.run("eval/latency.yaml", folder / "run", ["trust=true", "rounds=2", "device=cpu", *overrides])


@pytest.mark.parametrize("batch", [1, 4])
def test_parameters_and_multiply_adds_are_those_of_literal_formulas(ran, batch):
    rows = judged(ran, "teacher=true", f"batch={batch}")
    student = CONVOLUTION + 16 + 2 * 16 + LINEAR + clip_run.DIM  # with biases and the BatchNorm's two vectors
    assert value(rows, "parameters", part="encoder") == pytest.approx(student / 1e6, rel=1e-12)
    assert value(rows, "macs", part="encoder") == pytest.approx((CONVOLUTION * 16 + LINEAR) / 1e9, rel=1e-12)
    # The teacher is a ViT of 17 tokens, its text tower has 16; both have two layers of 32 channels.
    image = 3 * 8 * 8 * 32 * 16 + 2 * transformer_macs(17, 32) + 32 * clip_run.DIM
    text = 2 * transformer_macs(16, 32) + 32 * clip_run.DIM
    assert value(rows, "macs", "teacher", part="encoder") == pytest.approx(image / 1e9, rel=1e-12)
    assert value(rows, "macs", part="text") == pytest.approx(text / 1e9, rel=1e-12)
    head = cache.open_cache(clip_run.load(ran)).head()
    layer = 4 * 32 + (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32)
    literal = 49408 * 32 + 16 * 32 + 2 * layer + 2 * 32 + 32 * clip_run.DIM + 1  # the last is the logit scale
    assert latency.count(head) == literal and value(rows, "parameters", part="text") == literal / 1e6


def test_times_are_medians_and_quartiles_of_an_image_after_the_warm_up(ran, monkeypatch):
    calls = []

    def durations(works, device, rounds, clock=None):
        calls.append(rounds)
        return {name: [0.008, 0.004, 0.1, 0.012, 0.002][:rounds] for name in works}

    monkeypatch.setattr(latency, "durations", durations)
    rows = judged(ran, "rounds=5", "batch=2", "warm_up=3")
    assert calls == [3, 5]
    encoder, text = [row for row in rows if row["metric"] == "milliseconds"]
    assert (encoder["value"], encoder["low"], encoder["high"]) == pytest.approx((4.0, 2.0, 6.0))  # halves: 2 images
    assert (text["value"], text["low"], text["high"]) == pytest.approx((8.0, 4.0, 12.0))
    assert encoder["interval"] == "quartiles of 5 rounds" and encoder["count"] == 5
    assert (encoder["batch"], text["batch"]) == (2, 1)
    stored = json.loads((ran / "run/evaluation/latency.json").read_text())
    assert stored["times"][1]["milliseconds"] == [8.0, 4.0, 100.0, 12.0, 2.0]
    assert not any(row["metric"] == "peak_memory" for row in rows)  # of a GPU only


def test_a_row_states_the_machine_and_a_result_of_another_machine_is_made_again(ran, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(latency, "product_name", lambda device: "Some CPU")
    rows = judged(ran, "threads=2")
    (machine,) = {row["machine"] for row in rows if "machine" in row}
    assert machine == f"Some CPU, torch {torch.__version__}, fp32, threads=2"
    assert torch.get_num_threads() == before
    judge = []
    monkeypatch.setattr(Latency, "judge", lambda *arguments: judge.append(arguments) or ([], {}))
    assert judged(ran, "threads=2") == rows and not judge
    monkeypatch.setattr(latency, "product_name", lambda device: "Another CPU")
    assert judged(ran, "threads=2") == [] and len(judge) == 1


def test_a_sam_has_a_decoder_and_its_own_head_is_no_part_of_its_encoder(tmp_path):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    student = tiny.Student()
    rows, _ = Latency(rounds=1, warm_up=0, device="cpu").judge(recipe, {"student": student})
    head = cache.open_cache(recipe).head()
    encoder = sum(parameter.numel() for parameter in student.parameters())
    decoder = sum(parameter.numel() for parameter in head.parameters())
    assert value(rows, "parameters", part="encoder") == encoder / 1e6
    assert value(rows, "parameters", part="decoder") == decoder / 1e6
    assert value(rows, "macs", part="decoder") > 0
    student.head = head
    rows, _ = Latency(rounds=1, warm_up=0, device="cpu").judge(recipe, {"student": student})
    assert value(rows, "parameters", part="encoder") == encoder / 1e6


def test_a_run_whose_cache_is_gone_has_an_encoder_alone(ran, caplog):
    recipe = clip_run.load(ran, f"cache.root={ran}/gone")
    rows, _ = Latency(rounds=1, warm_up=0, device="cpu").judge(recipe, {"student": clip_run.Student()})
    assert {row["part"] for row in rows} == {"encoder"} and "the teacher's head is not measured" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["batch=0"], "batch=0: expected 1 or more"),
        (["rounds=0"], "rounds=0: expected 1 or more"),
        (["threads=0"], "threads=0: expected 1 or more"),
        (["warm_up=-1"], "warm_up=-1: expected 0 or more"),
        (["device=tpu"], "device=tpu: not a device"),
    ],
)
def test_what_measures_nothing_is_a_one_line_error(ran, overrides, says):
    with pytest.raises(UserError, match=says) as error:
        judged(ran, *overrides)
    assert "\n" not in str(error.value)


def test_a_teacher_without_weights_is_refused(ran):
    recipe = clip_run.load(ran, "teacher.model=local-dir:nowhere")
    with pytest.raises(UserError, match="teacher=true: its weights nowhere do not exist"):
        Latency(teacher=True).check(recipe)


@pytest.mark.slow
def test_an_exported_clip_has_the_sizes_of_its_files(tmp_path):
    recipe = clip_run.finished_tinyvit(tmp_path)
    out = export.run(recipe.out, "onnx", tmp_path / "exported")
    arguments = [f"recipe={recipe.out}/recipe.yaml", "rounds=2", "device=cpu", "threads=1"]
    rows = evaluate.run("eval/latency.yaml", out, arguments)
    student = distill.load_student(recipe.out)
    # The export multiplies the BatchNorms into the convolutions before them, which leaves a bias of their two vectors.
    assert value(rows, "parameters", part="encoder") == pytest.approx(latency.count(student) / 1e6, rel=2e-3)
    head = cache.open_cache(recipe).head()
    assert value(rows, "parameters", part="text") == pytest.approx(latency.count(head) / 1e6, rel=1e-3)
    assert {row["metric"] for row in rows} == {"parameters", "milliseconds"}
    assert all("onnxruntime " in row["machine"] for row in rows if row["metric"] == "milliseconds")


@pytest.mark.slow
def test_an_exported_sam_has_an_encoder_and_a_decoder(tmp_path):
    student, head = sam_exports.mini()
    out = sam_onnx.write(sam_exports.export(student, head, "onnx"), tmp_path / "onnx")
    exported = open_student(artefact.read(out))
    rows, details = Latency(rounds=2, device="cpu").judge(tiny.load(tmp_path), {"student": exported})
    decoder = value(rows, "parameters", part="decoder")
    assert decoder == pytest.approx(latency.count(head) / 1e6, rel=0.05)
    assert [np.isfinite(entry["milliseconds"]).all() for entry in details["times"]] == [True, True]
