from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import sam_exports

from fmdistill.export import checks, sam_onnx
from fmdistill.predict import artefact
from fmdistill.predict.sam_layouts import LAYOUTS, SamLayout
from fmdistill.predict.sam_onnx import open_artefact
from fmdistill.registry import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sam_onnx.write(sam_exports.export(*sam_exports.mini(), "onnx"), tmp_path_factory.mktemp("sam") / "out")


@pytest.fixture(scope="module")
def predictor(folder):
    return open_artefact(artefact.read(folder))


def test_an_image_may_be_pixels_a_pil_image_or_a_path(predictor, tmp_path):
    picture = checks.photographs()[0]
    PIL.Image.fromarray(picture).save(tmp_path / "cat.png")
    embeddings = []
    for image in (picture, PIL.Image.fromarray(picture), tmp_path / "cat.png", str(tmp_path / "cat.png")):
        predictor.set_image(image)
        embeddings.append(predictor.get_image_embedding())
    predictor.set_image(np.ascontiguousarray(picture[..., ::-1]), image_format="BGR")
    embeddings.append(predictor.get_image_embedding())
    assert all(np.array_equal(embedding, embeddings[0]) for embedding in embeddings)
    assert embeddings[0].shape == (1, 128, 16, 16)


def test_bad_calls_are_one_line(predictor, tmp_path):
    predictor.reset_image()
    (tmp_path / "text.png").write_text("no picture")
    point = {"point_coords": [[3, 4]], "point_labels": [1]}
    with pytest.raises(UserError, match="call set_image first"):
        predictor.predict(**point)
    for image in (tmp_path / "text.png", tmp_path / "absent.png", np.zeros((4, 4)), None):
        with pytest.raises(UserError, match="image"):
            predictor.set_image(image)
    predictor.set_image(checks.photographs()[0])
    for call, says in (
        ({}, "neither points nor a box"),
        ({"point_coords": [[3, 4]]}, "one label for each of 1 points"),
        ({"box": [1, 2, 3]}, "four numbers"),
        ({**point, "mask_input": np.zeros((1, 9, 9))}, r"expected \(1, 64, 64\)"),
    ):
        with pytest.raises(UserError, match=says) as error:
            predictor.predict(**call)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="load the run"):
        predictor.as_sam()


def test_logits_are_returned_on_request(predictor):
    predictor.set_image(checks.photographs()[0])
    point = {"point_coords": np.array([[100, 90]]), "point_labels": np.array([1])}
    masks, scores, low = predictor.predict(**point)
    logits = predictor.predict(**point, return_logits=True)[0]
    assert np.array_equal(logits > 0, masks)
    assert masks.shape == (3, 300, 451) and scores.shape == (3,) and low.shape == (3, 64, 64)
    assert predictor.predict(**point, multimask_output=False)[0].shape == (1, 300, 451)


def test_damaged_and_foreign_folders_are_one_line(folder, tmp_path):
    made = artefact.read(folder)
    with pytest.raises(UserError, match="run on the CPU"):
        open_artefact(made, "cuda")
    for model, says in (({}, "no 'layout' of a SAM"), ({**made.model, "layout": {"size": "x", "new": 1}}, "layout")):
        other = artefact.Artefact(made.folder, made.kind, made.format, made.precision, made.files, model, {}, {})
        with pytest.raises(UserError, match=says):
            open_artefact(other)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Path(folder).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "decoder.onnx").write_bytes(b"not ours")
    with pytest.raises(UserError, match="is not the file that was exported"):
        open_artefact(artefact.read(copy))


def test_a_layout_survives_json():
    for layout in LAYOUTS.values():
        stored = {name: list(v) if isinstance(v, tuple) else v for name, v in layout.to_json().items()}
        assert SamLayout.from_json(stored) == layout
