"""An exported folder is judged by a protocol as the run that it was exported from is."""

import json

import clip_run
import pytest
import sam_exports
import torch

from fmdistill import evaluate, export
from fmdistill.export import sam_onnx
from fmdistill.predict import artefact
from fmdistill.predict.onnx_student import open_student
from fmdistill.registry import UserError


@pytest.mark.slow
def test_a_protocol_gives_an_exported_clip_the_rows_of_its_run(tmp_path):
    recipe = clip_run.finished_tinyvit(tmp_path)
    out = export.run(recipe.out, "onnx", tmp_path / "exported")
    with pytest.raises(UserError, match="is an exported folder; add recipe=RECIPE"):
        evaluate.run("eval/cosine.yaml", out)

    own = evaluate.run("eval/cosine.yaml", recipe.out)
    rows = evaluate.run("eval/cosine.yaml", out, [f"recipe={recipe.out}/recipe.yaml"])
    numbers = ("value", "low", "high")
    named = [{key: entry for key, entry in row.items() if key not in numbers} for row in rows]
    assert named == [{key: entry for key, entry in row.items() if key not in numbers} for row in own]
    for row, right in zip(rows, own, strict=True):
        assert [row[key] for key in numbers] == pytest.approx([right[key] for key in numbers], abs=1e-5)
    stored = json.loads((tmp_path / "exported.evaluation/cosine.json").read_text())
    assert stored["rows"] == rows
    artefact.read(out).path("image.onnx")  # nothing was written into the folder


@pytest.mark.slow
def test_a_sam_s_encoder_embeds_a_batch_as_the_student_does(tmp_path):
    student, head = sam_exports.mini()
    out = sam_onnx.write(sam_exports.export(student, head, "onnx"), tmp_path / "onnx")
    images = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = student(images)["embedding"]
    torch.testing.assert_close(open_student(artefact.read(out))(images)["embedding"], right, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_an_encoder_that_takes_raw_pixels_is_refused(tmp_path):
    out = sam_onnx.write(sam_exports.export(*sam_exports.mini(), "anylabeling"), tmp_path / "raw")
    with pytest.raises(UserError, match="the encoder of anylabeling prepares the image itself"):
        open_student(artefact.read(out))
