"""An exported folder describes itself: what was edited, damaged or is missing is one clear line."""

import json

import pytest

from fmdistill.export.folder import describe, whole_folder
from fmdistill.predict import artefact
from fmdistill.registry import UserError


def exported(out):
    with whole_folder(out, artefact.NAME, "an") as folder:
        (folder / "onnx").mkdir()
        (folder / "onnx/encoder.onnx").write_bytes(b"network")
        describe(
            folder, kind="sam", format="onnx", precision="fp32", model={"shape": (1, 2)}, check={}, source={"seed": 0}
        )
    return out


def test_an_exported_folder_reads_back_as_it_was_described(tmp_path):
    opened = artefact.read(exported(tmp_path / "out"))
    assert (opened.kind, opened.format, opened.precision, opened.model) == ("sam", "onnx", "fp32", {"shape": [1, 2]})
    assert opened.path("onnx/encoder.onnx").read_bytes() == b"network"
    assert exported(tmp_path / "out") == tmp_path / "out"  # an earlier export is replaced


def test_what_is_not_as_exported_is_refused_with_the_file(tmp_path):
    out = exported(tmp_path / "out")
    path = out / artefact.NAME
    stored = json.loads(path.read_text())

    path.write_text(json.dumps({**stored, "precision": "int8"}))
    with pytest.raises(UserError, match="fmdistill.json: was edited after the export"):
        artefact.read(out)
    path.write_text(json.dumps({**stored, "version": 2}))
    with pytest.raises(UserError, match="has version 2, this fmdistill reads 1"):
        artefact.read(out)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        artefact.read(out)
    path.write_text("[]")
    with pytest.raises(UserError, match="has version 'list'"):
        artefact.read(out)
    path.write_text(json.dumps(stored))
    opened = artefact.read(out)
    with pytest.raises(UserError, match="names no file 'decoder.onnx'"):
        opened.path("decoder.onnx")
    (out / "onnx/encoder.onnx").write_bytes(b"netw0rk")
    with pytest.raises(UserError, match="encoder.onnx: is not the file that was exported"):
        opened.path("onnx/encoder.onnx")
    (out / "onnx/encoder.onnx").unlink()
    with pytest.raises(UserError, match="encoder.onnx: is missing"):
        opened.path("onnx/encoder.onnx")
    with pytest.raises(UserError, match="has no fmdistill.json, so it is no folder that fmdistill exported"):
        artefact.read(tmp_path)
