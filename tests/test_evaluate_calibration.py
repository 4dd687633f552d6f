"""Predicted IoU is compared with the real one as plain loops compare it; a stored power is used wherever it applies."""

import json
from pathlib import Path

import annotated_toys
import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from segment_anything import SamPredictor

import fmdistill
from fmdistill import cache, distill, evaluate
from fmdistill import recipe as recipes
from fmdistill.backbones.iou_correction import NAME, CorrectedIouHead, IouCorrection
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill.student import WEIGHTS
from fmdistill.evaluate.calibration import Calibration, cross_fitted, expected_error, fit
from fmdistill.evaluate.masks import innermost
from fmdistill.evaluate.results import value
from fmdistill.export.half import run as half
from fmdistill.export.mobilesam import run as mobilesam
from fmdistill.export.source import FinishedRun
from fmdistill.mini.sam import PACKAGED, sam_mini_student
from fmdistill.mini.scenes import decode_labels
from fmdistill.mini.tinyvit import tinyvit_sam_mini
from fmdistill.predict.checkpoint_file import whole_sam
from fmdistill.registry import UserError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    loaded = tiny.load(tmp_path_factory.mktemp("calibration"), "train.steps=1", "teacher.exact=true")
    cache.run(loaded)
    distill.run(loaded)
    return loaded


def student(recipe):
    return distill.load_student(recipe.out, trust=True)


def real_iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum()) if (a | b).any() else 1.0


def four(predictor: SamPredictor, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the masks (4, H, W) and the predicted IoU (4,) of a point."""
    answers = [predictor.predict(points[None], np.array([1]), multimask_output=multi) for multi in (False, True)]
    return np.concatenate([a[0] for a in answers]), np.concatenate([a[1] for a in answers])


def test_the_error_is_the_weighted_distance_of_the_means_of_ten_bins():
    predicted = np.array([0.05, 0.08, 0.31, 0.39, 0.95, 1.2, -0.1])
    real = np.array([0.20, 0.00, 0.50, 0.70, 0.80, 0.90, 0.10])
    # bins 0: .05, .08, -.1 against .2, .0, .1; 3: .31, .39 against .5, .7; 9: .95, 1.2 against .8, .9
    expected = (abs(0.03 - 0.30) + abs(0.70 - 1.20) + abs(2.15 - 1.70)) / 7
    assert expected_error(predicted, real) == pytest.approx(expected)
    assert expected_error(real, real) == 0


def test_the_power_is_the_best_of_all_and_changes_no_order():
    rng = np.random.default_rng(0)
    predicted = rng.uniform(0.05, 0.95, 4000)
    real = predicted**0.4 + rng.normal(0, 0.05, 4000)
    correction = fit(predicted, real)
    assert correction.exponent == pytest.approx(0.4, abs=0.01)
    grid = np.exp(np.linspace(-3, 3, 601))
    errors = [np.square(predicted**k - real).mean() for k in grid]
    assert abs(np.log(correction.exponent) - np.log(grid[np.argmin(errors)])) <= 0.01
    values = np.array([-0.3, -0.1, 0.0, 0.2, 0.99, 1.0, 1.4])
    assert (np.diff(correction(values)) > 0).all()
    np.testing.assert_allclose(correction(torch.from_numpy(values)).numpy(), correction(values))
    np.testing.assert_allclose(IouCorrection(2.0)(values), [-0.09, -0.01, 0, 0.04, 0.9801, 1, 1.96])
    with pytest.raises(UserError, match="exponent=0"):
        IouCorrection(0)


def test_each_image_is_corrected_by_a_fit_on_other_folds():
    rng = np.random.default_rng(1)
    predicted = [rng.uniform(0.1, 0.9, (6, 3)) for _ in range(7)]
    real = [array**0.5 for array in predicted]
    real[2] = predicted[2] ** 3  # image 2 and its fold, image 7 were there one, do not see themselves
    corrected = cross_fitted(predicted, real)
    np.testing.assert_allclose(corrected[2], predicted[2] ** 0.5, atol=1e-4)
    others = [i for i in range(7) if i % 5 != 0]
    own = fit(np.concatenate([predicted[i].ravel() for i in others]), np.concatenate([real[i].ravel() for i in others]))
    np.testing.assert_allclose(corrected[5], own(predicted[5]))


def test_against_the_teacher_equals_a_loop_over_the_predictor(recipe):
    protocol = Calibration(grid=3, limit=3, prompts_per_batch=4)
    rows, details = protocol.judge(recipe, {"student": student(recipe), "same": student(recipe)})
    data = CachedImages(cache.open_cache(recipe), "validation")
    predictors = [SamPredictor(tiny.teacher(exact=True).sam), fmdistill.load(recipe.out, trust=True)]
    predicted, real = [], []
    for number in range(3):
        encoded = data.encoded(0, number)
        pixels = data.cache.images.decode(encoded, data.shards[0].name)
        for predictor in predictors:
            predictor.set_image(pixels)
        for y in (np.arange(3) + 0.5) / 3 * pixels.shape[0]:
            for x in (np.arange(3) + 0.5) / 3 * pixels.shape[1]:
                (reference, _), (masks, scores) = (four(p, np.array([[x, y]])[0]) for p in predictors)
                predicted.append(scores)
                real.append([real_iou(a, b) for a, b in zip(masks, reference, strict=True)])
    for mask, part in {"0": slice(0, 1), "1-3": slice(1, 4)}.items():
        x, y = (np.array(values)[:, part].ravel() for values in (predicted, real))
        bias = value(rows, "bias", mask=mask)
        assert bias == pytest.approx(x.mean() - y.mean(), abs=2e-3)
        assert value(rows, "bias", "same", mask=mask) == bias
        assert value(rows, "ece", mask=mask) == pytest.approx(expected_error(x, y), abs=5e-3)
        assert value(rows, "spearman", mask=mask) == pytest.approx(stats.spearmanr(x, y).statistic, abs=0.03)
        bins = [row for row in rows if row["metric"] == "real_iou" and row["mask"] == mask and "corrected" not in row]
        assert sum(row["count"] for row in bins if row["subject"] == "student") == len(x)
    assert {row["subject"] for row in rows} == {"student", "same"}
    assert all({"low", "high"} <= row.keys() for row in rows if row["metric"] in ("ece", "bias"))
    assert [entry["subject"] for entry in details["exponents"]] == ["student", "same"]


@pytest.mark.parametrize("prompt", ["click", "box"])
def test_against_annotations_equals_a_loop_over_the_predictor(recipe, tmp_path, prompt):
    coco = annotated_toys.write(tmp_path, images=2, size=64)
    images = annotated_toys.source(tmp_path)
    protocol = Calibration(
        truth={"name": "coco"}, annotations=str(tmp_path / "coco.json"), images=images, prompt=prompt
    )
    rows, _ = protocol.judge(recipe, {"student": whole_sam(PACKAGED)})
    predictor, predicted, real = fmdistill.load(PACKAGED), [], []
    for record in coco["images"]:
        predictor.set_image(annotated_toys.pixels(tmp_path, record))
        labels = decode_labels((tmp_path / "labels" / record["file_name"].replace("jpg", "png")).read_bytes())
        for one in [a for a in coco["annotations"] if a["image_id"] == record["id"] and not a["iscrowd"]]:
            (number,) = (n for n in np.unique(labels[labels > 0]) if innermost(labels == n) == _point(one))
            x, y, width, height = one["bbox"]
            box = {"box": np.array([x, y, x + width, y + height])}
            click = {"point_coords": np.array([innermost(labels == number)]), "point_labels": np.array([1])}
            for multimask in (False, True):
                masks, scores, _ = predictor.predict(**(box if prompt == "box" else click), multimask_output=multimask)
                predicted += scores.tolist()
                real += [real_iou(mask, labels == number) for mask in masks]
    first, three = (np.arange(len(real)) % 4 == 0), (np.arange(len(real)) % 4 > 0)
    for mask, members in (("0", first), ("1-3", three)):
        x, y = np.array(predicted)[members], np.array(real)[members]
        assert np.ptp(y) > 0.2
        assert value(rows, "bias", mask=mask) == pytest.approx(x.mean() - y.mean(), abs=1e-3)
        assert value(rows, "ece", mask=mask) == pytest.approx(expected_error(x, y), abs=2e-3)
    assert value(rows, "skipped", reason="crowd") == 2


def _point(annotation: dict) -> tuple[int, int]:
    (x, y) = annotation["point_coords"][0]
    return int(x - 0.25), int(y - 0.25)


def test_a_stored_power_corrects_the_predictor_and_exports_and_other_weights_do_not_use_it(
    recipe, tmp_path, caplog, monkeypatch
):
    run = Path(recipe.out)
    pixels, prompt = np.arange(64 * 48 * 3, dtype=np.uint8).reshape(64, 48, 3), ([[20, 30]], [1])
    before = fmdistill.load(run, trust=True)
    before.set_image(pixels)
    rows = evaluate.run("eval/calibration.yaml", run, ["grid=2", "trust=true"])
    assert not (run / NAME).exists()
    with monkeypatch.context() as patched:
        patched.setattr(Calibration, "judge", lambda *given: pytest.fail("the stored result has the power"))
        assert evaluate.run("eval/calibration.yaml", run, ["grid=2", "store=true", "trust=true"]) == rows
    assert "set truth.name and annotations, or delete the file" in caplog.text
    content = json.loads((run / NAME).read_text())
    after = fmdistill.load(run, trust=True)
    after.set_image(pixels)
    for multimask in (True, False):
        raw, corrected = (predictor.predict(*prompt, multimask_output=multimask) for predictor in (before, after))
        expected = IouCorrection(content["exponent"])(raw[1]) if multimask else raw[1]
        np.testing.assert_allclose(corrected[1], expected, rtol=1e-5)
        assert (corrected[0] == raw[0]).all()
    assert content["errors"][0]["value"] == value(rows, "ece", mask="0")
    head = FinishedRun.of(run, trust=True).head()
    assert isinstance(head.mask_decoder.iou_prediction_head, CorrectedIouHead)
    plain = before.as_sam().mask_decoder.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in head.mask_decoder.state_dict().items())
    (run / NAME).write_text(json.dumps({**content, "weights": "others"}))
    head = FinishedRun.of(run, trust=True).head()
    assert not isinstance(head.mask_decoder.iou_prediction_head, CorrectedIouHead)
    (run / NAME).write_text("{}")
    with pytest.raises(UserError, match="not a correction"):
        fmdistill.load(run, trust=True)
    (run / NAME).unlink()


def test_a_power_at_the_end_of_the_range_is_not_stored(tmp_path):
    for power in (np.exp(-2.999), np.exp(2.999)):
        result = {"exponents": [{"subject": "student", "exponent": power}], "rows": [], "protocol": {}}
        with pytest.raises(UserError, match=f"no power corrects this run; the best, {power:.4g}"):
            Calibration().store_in(tmp_path, tmp_path / "student.safetensors", result)
    assert not list(tmp_path.iterdir())


def packaged():
    return sam_mini_student("packaged")


@pytest.mark.parametrize(("format", "student"), [(mobilesam, tinyvit_sam_mini), (half, packaged)])
def test_files_of_weights_hold_no_correction_and_say_so(tmp_path, caplog, monkeypatch, format, student):
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    monkeypatch.setattr(FinishedRun, "_head", lambda self: packaged().head)
    settings, network = recipes.load("recipes/mini/sam_mini.yaml"), student()
    format(FinishedRun(tmp_path, settings, network), tmp_path / "plain")
    assert "without the correction" not in caplog.text
    IouCorrection(0.5).store(tmp_path, tmp_path / WEIGHTS, {})
    format(FinishedRun(tmp_path, settings, network), tmp_path / "corrected")
    assert "corrected: predicts IoU without the correction" in caplog.text
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "corrected").read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": 0}, "grid=0"),
        ({"bins": 0}, "bins=0"),
        ({"annotations": "x.json"}, "set truth.name"),
        ({"prompt": "box"}, "set truth.name"),
        ({"truth": {"name": "teacher"}}, "leave it out"),
        ({"truth": {"name": "nothing"}}, "nothing"),
    ],
)
def test_settings_that_measure_nothing_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        Calibration(**settings)


def test_without_a_teacher_or_a_run_to_store_in_it_is_one_line(recipe, tmp_path):
    annotated_toys.write(tmp_path, images=1, size=64)
    with pytest.raises(UserError, match="the teacher is not at hand"):
        Calibration(images=annotated_toys.source(tmp_path)).judge(recipe, {"student": student(recipe)})
    file = Path(recipe.out) / "student.safetensors"
    with pytest.raises(UserError, match="store=true: writes into a run"):
        evaluate.run("eval/calibration.yaml", file, [f"recipe={recipe.out}/recipe.yaml", "store=true", "trust=true"])
    with pytest.raises(UserError, match="store=true: grid_miou fits nothing that a run could store"):
        evaluate.run("eval/sam_grid_miou.yaml", recipe.out, ["store=true", "trust=true"])
    with pytest.raises(UserError, match="store='maybe': expected bool"):
        evaluate.run("eval/calibration.yaml", recipe.out, ["store=maybe", "trust=true"])
