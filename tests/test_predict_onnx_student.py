"""An exported folder is judged by a protocol as the run that it was exported from is."""

import json

import clip_run
import pytest
import sam_exports
import torch
from nondegenerate import randomize

from fmdistill import cache, evaluate, export
from fmdistill.backbones.tinyvit_clip import tinyvit_clip
from fmdistill.export import sam_onnx
from fmdistill.predict import artefact
from fmdistill.predict.onnx_student import open_student
from fmdistill.registry import UserError

STUDENT = ["student.name=tinyvit_clip", "student.embed_dim=24", "student.image_size=32"]


def test_a_protocol_gives_an_exported_clip_the_rows_of_its_run(tmp_path):
    clip_run.write_teacher(tmp_path / "teacher")
    clip_run.write_classes(tmp_path / "train", 1)
    clip_run.write_classes(tmp_path / "val", 1, seed=50)
    recipe = clip_run.load(tmp_path, *STUDENT)
    cache.run(recipe)
    clip_run.finish(recipe, randomize(tinyvit_clip("5m", embed_dim=24, image_size=32), 5))
    out = export.run(recipe.out, "onnx", tmp_path / "exported")
    with pytest.raises(UserError, match="is an exported folder; add recipe=RECIPE"):
        evaluate.run("eval/cosine.yaml", out)

    own = evaluate.run("eval/cosine.yaml", recipe.out)
    rows = evaluate.run("eval/cosine.yaml", out, [f"recipe={recipe.out}/recipe.yaml"])
    assert [{**row, "value": None} for row in rows] == [{**row, "value": None} for row in own]
    for row, right in zip(rows, own, strict=True):
        assert row["value"] == pytest.approx(right["value"], abs=1e-5)
    stored = json.loads((tmp_path / "exported.evaluation/cosine.json").read_text())
    assert stored["rows"] == rows
    artefact.read(out).path("image.onnx")  # nothing was written into the folder


def test_a_sam_s_encoder_embeds_a_batch_as_the_student_does(tmp_path):
    student, head = sam_exports.mini()
    out = sam_onnx.write(sam_exports.export(student, head, "onnx"), tmp_path / "onnx")
    images = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = student(images)["embedding"]
    torch.testing.assert_close(open_student(artefact.read(out))(images)["embedding"], right, rtol=1e-3, atol=1e-3)


def test_an_encoder_that_takes_raw_pixels_is_refused(tmp_path):
    out = sam_onnx.write(sam_exports.export(*sam_exports.mini(), "anylabeling"), tmp_path / "raw")
    with pytest.raises(UserError, match="the encoder of anylabeling prepares the image itself"):
        open_student(artefact.read(out))
