import copy
import json
from types import SimpleNamespace

import numpy as np
import onnx as onnx_package
import PIL.Image
import pytest
import sam_exports
import torch
import yaml
from segment_anything import SamPredictor

from fmdistill.backbones.iou_correction import IouCorrection
from fmdistill.backbones.sam import PIXEL_MEAN, PIXEL_STD
from fmdistill.export import checks, onnx, sam_onnx, transformers
from fmdistill.export.checks import relative_error
from fmdistill.predict import artefact
from fmdistill.predict.onnx_session import Session
from fmdistill.predict.sam_onnx import open_artefact
from fmdistill.registry import UserError

PHOTOS = checks.photographs()  # 3:2 landscape, ..., a square, a portrait
SHAPES = [PHOTOS[0], PHOTOS[-2], PHOTOS[-1]]
LABELS = (1.0, 0.0, 1.0, 1.0, 0.0)


@pytest.fixture(scope="module")
def networks():
    return sam_exports.mini()


@pytest.fixture(scope="module")
def exported(networks, tmp_path_factory):
    """A function of a format's name that exports the student once and returns its artefact."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def of(name: str, single: bool = False):
        if (name, single) not in made:
            out = sam_onnx.write(sam_exports.export(*networks, name, single), folder / f"{name}{single}", "fp32", 0.999)
            made[name, single] = artefact.read(out)
        return made[name, single]

    return of


def feeds(layout, grid: int, size: tuple[int, int], points: int, flag: float, channels: int = 128, seed: int = 0):
    drawn = np.random.default_rng(seed)
    low = layout["mask_side"] or 4 * grid
    mask = np.repeat(np.repeat(drawn.normal(size=(4 * grid, 4 * grid)), low // (4 * grid), 0), low // (4 * grid), 1)
    return {
        "image_embeddings": drawn.normal(size=(1, channels, grid, grid)).astype(np.float32),
        "point_coords": drawn.uniform(0, layout["frame"] or 16 * grid, (1, points, 2)).astype(np.float32),
        "point_labels": np.array([[1, 0, 2, 3, -1, 1][:points]], np.float32),
        "mask_input": mask[None, None].astype(np.float32),
        "has_mask_input": np.full(layout["flag_shape"], flag, np.float32),
        layout["size"]: np.array(size, layout["size_type"]).reshape(layout["size_shape"]),
    }


def padded(given):
    """The feeds with SAM's padding point."""
    points = np.concatenate([given["point_coords"], np.zeros((1, 1, 2), np.float32)], 1)
    labels = np.append(given["point_labels"], np.float32([[-1]]), 1)
    return {**given, "point_coords": points, "point_labels": labels}


def expected(head, layout, single, given):
    """What SamOnnxModel computes in PyTorch for the same feeds, with the layout's frame, sides and flag undone."""
    side, low = head.config["image_size"], 4 * head.config["image_embedding_size"]
    step = given["mask_input"].shape[-1] // low
    if layout["pads"] and np.isin(given["point_labels"], (0, 1)).all():
        given = padded(given)
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    return sam_exports.official(head, single)(
        tensors["image_embeddings"],
        tensors["point_coords"] * side / (layout["frame"] or side),
        tensors["point_labels"],
        tensors["mask_input"][..., ::step, ::step],
        tensors["has_mask_input"].reshape(1).clamp(0, 1),
        tensors[layout["size"]].reshape(2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name, single", [("onnx", False), ("onnx", True), ("anylabeling", True), ("labelme", True),
                                          ("openvino", False)])  # fmt: skip
def test_the_decoder_equals_segment_anything_s_own(exported, networks, name, single):
    made = exported(name, single)
    layout, session = made.model["layout"], Session(made.path("decoder.onnx"))
    names = ["image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", layout["size"]]
    assert list(session.inputs) == names
    assert session.outputs == [layout["masks"], "iou_predictions", "low_res_masks"]
    sizes = [(684, 1024)] if layout["canvas"] else [(300, 451), (400, 400), (300, 200)]
    cases = [(n, flag, sizes[n % len(sizes)]) for n, flag in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 1.0), (5, 0.0))]
    for points, flag, size in cases:
        given = feeds(layout, 16, size, points, flag)
        masks, scores, low = session(given).values()
        right = expected(networks[1], layout, single, given)
        assert masks.shape == (1, 1 if single else 4, *size)
        assert relative_error(masks, right[0].numpy()) < 1e-3
        assert relative_error(scores, right[1].numpy()) < 1e-3
        side = layout["mask_side"] or 64  # tools draw masks from these too, so a larger side must be smooth
        enlarged = torch.nn.functional.interpolate(right[2], (side, side), mode="bilinear")
        assert low.shape == enlarged.shape and relative_error(low, enlarged.numpy()) < 1e-3


def test_a_correction_of_predicted_iou_is_in_the_file_and_changes_nothing_else(exported, networks, tmp_path):
    student, head = networks[0], copy.deepcopy(networks[1])
    correction = IouCorrection(0.6)
    correction.apply(head)
    out = sam_onnx.write(sam_exports.export(student, head, "onnx"), tmp_path / "out")
    answers = []
    for opened in (exported("onnx"), artefact.read(out)):
        predictor = open_artefact(opened, "cpu")
        predictor.set_image(SHAPES[0])
        answers.append(predictor.predict(np.array([[40.0, 50.0]]), np.array([1])))
    np.testing.assert_allclose(answers[1][1], correction(answers[0][1]), rtol=1e-5)
    assert np.ptp(answers[0][1]) > 0.1 and (answers[1][0] == answers[0][0]).all()


def test_a_flag_of_minus_one_means_no_mask(exported):
    made = exported("labelme")
    session = Session(made.path("decoder.onnx"))
    given = feeds(made.model["layout"], 16, (300, 451), 2, -1.0)
    assert given["mask_input"].shape == (1, 1, 256, 256)  # which osam always sends
    none = {**given, "has_mask_input": np.zeros(1, np.float32)}
    mask = {**given, "has_mask_input": np.ones(1, np.float32)}
    assert np.array_equal(session(given)["masks"], session(none)["masks"])
    assert relative_error(session(mask)["masks"], session(none)["masks"]) > 0.01


def test_openvino_s_decoder_takes_masks_of_any_side_and_pads_clicks_itself(exported, networks):
    made = exported("openvino")
    layout, session = made.model["layout"], Session(made.path("decoder.onnx"))
    assert session.inputs["mask_input"] == ("tensor(float)", [1, 1, "mask_height", "mask_width"])
    given = feeds(layout, 16, (300, 451), 2, 1.0)
    given["point_labels"] = np.array([[1, 0]], np.float32)
    right = expected(networks[1], layout, False, padded(given))
    for case in (given, padded(given)):  # model_api gives clicks without SAM's padding point, other programs with it
        masks, scores, low = session(case).values()
        assert relative_error(masks, right[0].numpy()) < 1e-3 and relative_error(scores, right[1].numpy()) < 1e-3
        assert low.shape == (1, 4, 64, 64)
    none = {**given, "has_mask_input": np.zeros((1, 1), np.float32)}
    larger = {**none, "mask_input": np.zeros((1, 1, 256, 256), np.float32)}  # which model_api always sends
    assert np.array_equal(session(larger)["upscaled_masks"], session(none)["upscaled_masks"])


def test_openvino_s_encoder_puts_zeros_where_model_api_pads_with_grey(exported):
    made = exported("openvino")
    session, drawn = Session(made.path("encoder.onnx")), np.random.default_rng(0)
    mean, std = np.array(PIXEL_MEAN).reshape(3, 1, 1), np.array(PIXEL_STD).reshape(3, 1, 1)
    for h, w in ((170, 256), (256, 131), (256, 256)):
        zeros = np.zeros((1, 3, 256, 256), np.float32)
        grey = np.broadcast_to((114 - mean) / std, zeros.shape).astype(np.float32).copy()
        pixels = (drawn.integers(0, 256, (3, h, w)) - mean) / std
        zeros[0, :, :h, :w] = grey[0, :, :h, :w] = pixels
        assert np.array_equal(session({"x": grey})["image_embeddings"], session({"x": zeros})["image_embeddings"])


def test_openvino_s_files_state_model_api_s_settings(exported):
    made = exported("openvino")
    stated = {
        name: {entry.key: entry.value for entry in onnx_package.load(str(made.path(f"{name}.onnx"))).metadata_props}
        for name in ("encoder", "decoder")
    }
    assert stated["decoder"] == {"model_info model_type": "sam_decoder", "model_info image_size": "256"}
    assert stated["encoder"] == {
        "model_info model_type": "sam_image_encoder",
        "model_info image_size": "256",
        "model_info resize_type": "fit_to_window",
        "model_info mean_values": "123.675 116.28 103.53",
        "model_info scale_values": "58.395 57.12 57.375",
        "model_info pad_value": "114",
    }


def test_the_encoder_takes_normalised_squares_or_raw_canvases(exported, networks):
    session = Session(exported("labelme").path("encoder.onnx"))
    assert session.inputs == {"x": ("tensor(float)", [1, 3, 256, 256])}
    assert session.outputs == ["image_embeddings"]

    session = Session(exported("anylabeling").path("encoder.onnx"))
    assert session.inputs == {"input_image": ("tensor(float)", ["height", "width", 3])}
    for picture in SHAPES:
        scale = min(684 / picture.shape[0], 1024 / picture.shape[1])
        h, w = round(picture.shape[0] * scale), round(picture.shape[1] * scale)
        canvas = np.zeros((684, 1024, 3), np.float32)  # raw black beside the picture
        canvas[:h, :w] = np.asarray(PIL.Image.fromarray(picture).resize((w, h)))
        small = torch.nn.functional.interpolate(
            torch.from_numpy(canvas).permute(2, 0, 1)[None], (171, 256), mode="bilinear", antialias=True
        )
        padded = torch.zeros(1, 3, 256, 256)
        mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
        padded[:, :, :171] = (small - mean) / std
        with torch.no_grad():
            right = networks[0](padded)["embedding"].numpy()
        assert relative_error(session({"input_image": canvas})["image_embeddings"], right) < 1e-3


@pytest.mark.parametrize("picture", SHAPES, ids=["3:2", "square", "portrait"])
def test_the_predictor_agrees_with_segment_anything_s(exported, networks, picture):
    predictor, reference = open_artefact(exported("onnx")), SamPredictor(sam_exports.whole_sam(*networks))
    predictor.set_image(picture)
    reference.set_image(picture)
    assert relative_error(predictor.get_image_embedding(), reference.get_image_embedding().numpy()) < 1e-3
    drawn, area = np.random.default_rng(0), np.array(picture.shape[1::-1])
    points, box = drawn.uniform(0, 1, (5, 2)) * area, np.array([0.2, 0.1, 0.8, 0.7]) * np.tile(area, 2)
    cases = [{"point_coords": points[:n], "point_labels": np.array(LABELS[:n])} for n in range(1, 6)]
    cases += [{"box": box}, {"box": box, **cases[1]}, {**cases[0], "multimask_output": False}]
    low = reference.predict(**cases[0])[2][:1]
    cases.append({**cases[1], "mask_input": low})
    for case in cases:
        masks, scores, logits = predictor.predict(**case)
        right = reference.predict(**case)
        assert masks.dtype == bool and masks.shape == right[0].shape
        assert sam_exports.iou(masks, right[0]) >= 0.999
        assert relative_error(logits, right[2]) < 1e-3 and relative_error(scores, right[1]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["labelme", "openvino", "transformers"])
def test_the_predictor_opens_every_layout(exported, networks, name):
    predictor, reference = open_artefact(exported(name)), SamPredictor(sam_exports.whole_sam(*networks))
    picture = SHAPES[0]
    predictor.set_image(picture)
    reference.set_image(picture)
    point = {"point_coords": np.array([[150.0, 120.0]]), "point_labels": np.array([1])}
    masks = predictor.predict(**point)[0]
    right, scores, _ = reference.predict(**point)
    if predictor.layout.single:
        right = right[[scores.argmax()]]
    assert masks.shape == right.shape and sam_exports.iou(masks, right) >= 0.999
    assert predictor.predict(box=np.array([50.0, 40.0, 300.0, 200.0]))[0].shape[1:] == picture.shape[:2]


@pytest.mark.parametrize("picture", SHAPES, ids=["3:2", "square", "portrait"])
def test_the_predictor_draws_on_anylabeling_s_canvas_and_returns_masks_of_the_picture(exported, networks, picture):
    predictor, reference = open_artefact(exported("anylabeling")), SamPredictor(sam_exports.whole_sam(*networks))
    predictor.set_image(picture)
    reference.set_image(np.zeros((684, 1024, 3), np.uint8))
    reference.features = torch.from_numpy(predictor.get_image_embedding())
    height, width = picture.shape[:2]
    scale = min(684 / height, 1024 / width)
    points, labels = np.array([[0.4, 0.3], [0.7, 0.6]]) * [width, height], np.array([1, 0])
    masks = predictor.predict(points, labels)[0]
    logits, _, _ = reference.predict(points * scale, labels, multimask_output=False, return_logits=True)
    own = torch.from_numpy(logits[None, :, : round(height * scale), : round(width * scale)])
    right = torch.nn.functional.interpolate(own, (height, width), mode="bilinear")[0].numpy() > 0
    assert masks.shape == (1, height, width) and 0 < right.mean() < 1
    assert sam_exports.iou(masks, right) >= 0.999


def test_transformers_files_take_several_images_and_prompts(exported, networks):
    made, (student, head) = exported("transformers"), networks
    encoder = Session(made.path("onnx/vision_encoder.onnx"))
    decoder = Session(made.path("onnx/prompt_encoder_mask_decoder.onnx"))
    assert encoder.inputs["pixel_values"] == ("tensor(float)", ["batch", 3, 256, 256])
    assert decoder.inputs["input_labels"] == ("tensor(int64)", ["batch", "prompts", "points"])
    assert decoder.outputs == ["iou_scores", "pred_masks"]
    images = np.random.default_rng(0).normal(size=(2, 3, 256, 256)).astype(np.float32)
    features = encoder({"pixel_values": images})
    assert list(features) == ["image_embeddings", "image_positional_embeddings"]
    points = np.random.default_rng(1).uniform(0, 256, (2, 3, 2, 2)).astype(np.float32)
    labels = np.array([[[1, 0], [1, 1], [0, 1]]] * 2)
    outputs = decoder({"input_points": points, "input_labels": labels, **features})
    assert outputs["pred_masks"].shape == (2, 3, 3, 64, 64) and outputs["iou_scores"].shape == (2, 3, 3)
    with torch.no_grad():
        embeddings = student(torch.from_numpy(images))["embedding"]
        for b in range(2):
            logits, scores = head.decode(embeddings[b], torch.from_numpy(points[b]), torch.from_numpy(labels[b]))
            assert relative_error(outputs["pred_masks"][b], logits.numpy()) < 1e-3
            assert relative_error(outputs["iou_scores"][b], scores.numpy()) < 1e-3
    filled = decoder({"input_points": points, "input_labels": np.where(labels == 0, -10, labels), **features})
    assert relative_error(filled["pred_masks"][0, 0], outputs["pred_masks"][0, 0]) > 1e-3
    processor = json.loads(made.path("preprocessor_config.json").read_text())
    assert processor["size"] == {"longest_edge": 256} and processor["pad_size"] == {"height": 256, "width": 256}
    assert json.loads(made.path("config.json").read_text())["model_type"] == "sam"


def test_the_yaml_of_anylabeling_names_its_files(exported):
    made = exported("anylabeling")
    config = yaml.safe_load(made.path("config.yaml").read_text())
    assert config["type"] == "segment_anything" and config["name"]
    assert (config["input_size"], config["max_width"], config["max_height"]) == (1024, 1024, 682)
    assert made.path(config["encoder_model_path"]).is_file() and made.path(config["decoder_model_path"]).is_file()


def test_the_json_states_what_was_measured(exported):
    check = exported("onnx").check
    assert check["pictures"] == 2 and check["prompts"] == 16 and check["masks"] == 64
    assert check["miou"] >= 0.999 and check["embedding_error"] < 1e-3
    assert exported("onnx").model["opset"] == 18


def test_masks_below_the_limit_publish_nothing(networks, tmp_path, monkeypatch):
    write = sam_onnx._write_networks

    def damaged(student, head, layout, encoder, decoder):
        write(sam_exports.randomize(sam_exports.tinyvit_sam_mini(), 5), head, layout, encoder, decoder)

    monkeypatch.setattr(sam_onnx, "_write_networks", damaged)
    with pytest.raises(UserError, match=r"miou is 0\.\d+, below min_miou=0.99; nothing was written; accept") as error:
        sam_onnx.write(sam_exports.export(*networks, "onnx"), tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_student_that_does_not_fit_its_head_is_one_line(tmp_path, networks):
    other = sam_exports.head(sam_exports.MINI | {"embed_dim": 64})
    with pytest.raises(UserError, match=r"embedding is \(128, 16, 16\), but its head's is \(64, 16, 16\)"):
        sam_onnx.write(sam_exports.export(networks[0], other, "onnx"), tmp_path / "out")
    with pytest.raises(UserError, match="image side is 256, its head's 1024"):
        sam_onnx.write(sam_exports.export(networks[0], sam_exports.head(sam_exports.FULL), "onnx"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_family_or_its_settings_are_one_line(tmp_path):
    clip = SimpleNamespace(family="clip", recipe=SimpleNamespace(out="runs/clip"))
    with pytest.raises(UserError, match="labelme exports SAM students"):
        sam_onnx.labelme(clip, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="export.single=True: is a setting of sam students"):
        onnx.run(clip, tmp_path / "out", single=True)  # type: ignore[arg-type]
    timm = SimpleNamespace(family="timm", recipe=SimpleNamespace(out="runs/timm"))
    with pytest.raises(UserError, match="transformers exports students of sam and clip"):
        transformers.run(timm, tmp_path / "out")  # type: ignore[arg-type]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").touch()
    sam = SimpleNamespace(family="sam")
    with pytest.raises(UserError, match="already exists and is not an onnx export"):
        sam_onnx.onnx(sam, tmp_path / "own")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_tinyvit_5m_at_1024_px_agrees(tmp_path):
    networks = sam_exports.full()
    made = artefact.read(sam_onnx.write(sam_exports.export(*networks, "anylabeling"), tmp_path / "any", "fp32", 0.999))
    assert made.check["embedding_error"] < 1e-3
    session = Session(made.path("decoder.onnx"))
    given = feeds(made.model["layout"], 64, (684, 1024), 3, 0.0, 256)
    right = expected(networks[1], made.model["layout"], True, given)
    assert relative_error(session(given)["low_res_masks"], right[2].numpy()) < 1e-3
    made = artefact.read(sam_onnx.write(sam_exports.export(*networks, "onnx"), tmp_path / "onnx", "fp32", 0.999))
    predictor, reference = open_artefact(made), SamPredictor(sam_exports.whole_sam(*networks))
    predictor.set_image(SHAPES[0])
    reference.set_image(SHAPES[0])
    point = {"point_coords": np.array([[150.0, 120.0]]), "point_labels": np.array([1])}
    assert sam_exports.iou(predictor.predict(**point)[0], reference.predict(**point)[0]) >= 0.999
