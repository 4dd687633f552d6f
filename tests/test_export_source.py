"""A finished run to export: its family, preprocessing and head, of its teacher or its own."""

import clip_run
import pytest
import torch
from nondegenerate import randomize

from fmdistill import export, recipe
from fmdistill.backbones.clip import TextHead
from fmdistill.backbones.sam import SamPreprocess
from fmdistill.export import checks
from fmdistill.export.source import FinishedRun
from fmdistill.mini.clip import clip_mini_student
from fmdistill.mini.sam import sam_mini_student
from fmdistill.predict import artefact
from fmdistill.registry import UserError


def finished(tmp_path, name: str, student):
    loaded = recipe.load(f"recipes/mini/{name}.yaml", [f"out={tmp_path}/run", "student.pretrained=none"])
    return clip_run.finish(loaded, student)


def test_a_sam_that_had_no_teacher_is_exported_with_its_own_head(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(checks, "pictures", lambda recipe, split, count: checks.photographs()[:1])
    student = sam_mini_student("packaged").eval()
    run = finished(tmp_path, "sam_mini", student)
    source = FinishedRun.of(run)
    assert source.family == "sam" and source.preprocess == SamPreprocess(256)
    assert torch.equal(source.head().mask_decoder.iou_token.weight, student.head.mask_decoder.iou_token.weight)
    out = export.run(run, "onnx", tmp_path / "out")
    assert artefact.read(out).check["miou"] > 0.999
    assert "the teacher's" not in (out / "README.md").read_text()


@pytest.mark.slow
def test_a_clip_that_had_no_teacher_is_exported_with_its_own_text_tower(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(checks, "pictures", lambda recipe, split, count: checks.photographs()[:1])
    run = finished(tmp_path, "clip_mini", randomize(clip_mini_student(), 2))
    source = FinishedRun.of(run)
    assert source.family == "clip" and isinstance(source.head(), TextHead)
    assert artefact.read(export.run(run, "onnx", tmp_path / "out")).check["text_cosine"]["min"] > 0.9999
    described = artefact.read(export.run(run, "openclip", tmp_path / "openclip"))
    assert described.check["image_cosine"]["min"] > 0.9999


def test_a_run_without_cache_and_head_is_one_line(tmp_path):
    run = finished(tmp_path, "sam_mini", sam_mini_student("none"))
    source = FinishedRun(run, FinishedRun.of(run).recipe, torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="its recipe has no `cache`, where the teacher's head"):
        source.head()
