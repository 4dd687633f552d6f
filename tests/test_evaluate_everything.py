"""Automatic masks are compared as plain loops over segment_anything's generator compare them."""

import itertools
import json
from dataclasses import replace

import annotated_toys
import numpy as np
import plain_prompts
import pytest
import tiny
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from segment_anything import SamAutomaticMaskGenerator

from fmdistill import cache, distill, evaluate
from fmdistill import recipe as recipes
from fmdistill.evaluate import everything
from fmdistill.evaluate.everything import Everything, overlaps, pair
from fmdistill.evaluate.results import value
from fmdistill.evaluate.stored_results import Partial
from fmdistill.mini.sam import PACKAGED, build_sam_mini
from fmdistill.predict.checkpoint_file import whole_sam
from fmdistill.predict.sam import as_sam
from fmdistill.registry import UserError

IOUS = (0.97, 0.99)  # the noise of the worse model changes masks by a few pixels
SETTINGS = {"points_per_side": 6, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.5}
SURE = {"points_per_side": 5, "pred_iou_thresh": 0.1, "stability_score_thresh": 0.5}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    loaded = tiny.load(tmp_path_factory.mktemp("everything"), "train.steps=1")
    cache.run(loaded)
    distill.run(loaded)
    return loaded


def student(recipe):
    return distill.load_student(recipe.out, trust=True)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return plain_prompts.toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def models():
    return plain_prompts.models()


@pytest.fixture(scope="module")
def judging(toys, models):
    """Return a call that judges the models on two toys, with sam_mini as their teacher, and stores partial results."""
    images, settings = annotated_toys.source(toys), recipes.load("recipes/demo/sam_mse.yaml")
    protocol = Everything(**SETTINGS, ious=IOUS, images=images, teacher=True, limit=2, device="cpu")
    return lambda: protocol.judge(settings, dict(models), Partial.open(toys / "everything.jsonl", {}))


@pytest.fixture(scope="module")
def judged(judging):
    return judging()


def generated(toys, model):
    """Return segment_anything's own masks of the first two toys, as COCO's RLE."""
    generator = SamAutomaticMaskGenerator(as_sam(model, model.head), **SETTINGS, output_mode="coco_rle")
    pictures = [annotated_toys.pixels(toys, {"file_name": f"{number:012d}.jpg"}) for number in range(2)]
    return [[mask["segmentation"] for mask in generator.generate(picture)] for picture in pictures]


def best_pairs(iou_TS: np.ndarray) -> np.ndarray:
    """Return the IoU of the T masks with their pairs, by trying all assignments; T is at most S."""
    ways = itertools.permutations(range(iou_TS.shape[1]), len(iou_TS))
    return max((iou_TS[range(len(iou_TS)), list(columns)] for columns in ways), key=np.sum)


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 6)])
def test_pairs_have_the_largest_sum_of_all_assignments(shape):
    iou_TS = np.random.default_rng(sum(shape)).random(shape)
    np.testing.assert_allclose(pair(iou_TS), best_pairs(iou_TS))
    np.testing.assert_allclose(np.sort(pair(iou_TS.T))[-shape[0] :], np.sort(best_pairs(iou_TS)))
    assert len(pair(iou_TS.T)) == shape[1] and np.count_nonzero(pair(iou_TS.T)) == shape[0]
    assert pair(np.zeros((0, 3))).tolist() == [] and pair(np.zeros((3, 0))).tolist() == [0, 0, 0]


def test_the_overlaps_are_those_of_the_pixels():
    masks = torch.rand(5, 9, 11, generator=torch.Generator().manual_seed(0)).numpy() > 0.5
    masks[0] = masks[3] = False
    rles = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    expected = [[plain_prompts.plain_iou(a, b) for b in masks[2:]] for a in masks[:2]]
    assert expected[0][1] == 1
    np.testing.assert_allclose(overlaps(rles[:2], rles[2:]), expected)


def test_the_teacher_against_itself_recalls_every_mask(judged):
    rows, _ = judged
    for metric, dimensions in (("recall", {"iou": IOUS[0]}), ("recall", {"iou": IOUS[1]}), ("matched_miou", {})):
        assert value(rows, metric, "packaged", **dimensions) == 1
    assert value(rows, "count_ratio", "packaged") == 1


def test_figures_equal_those_of_segment_anything_s_own_masks(judged, toys, models):
    rows, details = judged
    teacher, student = (generated(toys, models[name]) for name in ("packaged", "worse"))
    pairs = []
    for of, to in zip(teacher, student, strict=True):
        of_THW, to_SHW = (np.array([coco_mask.decode(rle).astype(bool) for rle in rles]) for rles in (of, to))
        pairs.append(pair(np.array([[plain_prompts.plain_iou(a, b) for b in to_SHW] for a in of_THW])))
    iou = np.concatenate(pairs)
    assert 4 < len(iou) and 0.02 < (iou >= IOUS[1]).mean() < 0.98, "the scores are degenerate"
    for threshold in IOUS:
        assert value(rows, "recall", "worse", iou=threshold) == pytest.approx((iou >= threshold).mean(), abs=1e-9)
    assert value(rows, "matched_miou", "worse") == pytest.approx(iou[iou >= IOUS[0]].mean(), abs=1e-3)
    made, own = ([len(masks) for masks in images] for images in (teacher, student))
    assert value(rows, "count_ratio", "worse") == pytest.approx(sum(own) / sum(made))
    assert value(rows, "masks", "worse") == sum(own) / 2 and value(rows, "masks", "teacher") == sum(made) / 2
    assert value(rows, "without_masks", "teacher") == made.count(0)
    assert [image["masks"] for image in details["images"] if image["subject"] == "worse"] == own


def test_images_that_were_judged_before_a_stop_are_not_judged_again(judging, judged, toys, monkeypatch):
    stored = (toys / "everything.jsonl").read_text().splitlines(keepends=True)
    (toys / "everything.jsonl").write_text("".join(stored[:-1]))
    names, judge = [], everything._judge
    monkeypatch.setattr(everything, "_judge", lambda *given: names.append(given[1].name) or judge(*given))
    assert judging()[0] == judged[0] and len(names) == 1


def test_average_recall_equals_pycocotools_on_all_images_together(recipe, tmp_path):
    coco = annotated_toys.write(tmp_path, images=3, size=96)
    coco["annotations"] += [{**coco["annotations"][-1], "id": 99, "segmentation": {"size": [1, 1], "counts": [1]}}]
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(coco))
    settings = {"truth": {"name": "coco"}, "annotations": str(path), "images": annotated_toys.source(tmp_path)}
    protocol = Everything(**SURE, **settings)
    rows, details = protocol.judge(recipe, {"student": whole_sam(PACKAGED)})
    generator = SamAutomaticMaskGenerator(build_sam_mini("packaged"), **SURE, output_mode="coco_rle")
    detections = []
    for record in coco["images"]:
        for mask in generator.generate(annotated_toys.pixels(tmp_path, record)):
            scored = {"score": mask["predicted_iou"], "segmentation": mask["segmentation"]}
            detections.append({"image_id": record["id"], "category_id": 1, **scored})
    truth = COCO(str(tmp_path / "coco.json"))
    evaluation = COCOeval(truth, truth.loadRes(detections), "segm")
    evaluation.params.useCats, evaluation.params.maxDets = 0, [1, 10, 1000]
    evaluation.evaluate()
    evaluation.accumulate()
    recall_TKAM = evaluation.eval["recall"]
    assert 0.05 < recall_TKAM[:, 0, 0, -1].mean() < 0.95
    for number, size in enumerate([None, "small", "medium", "large"]):
        recall_T = recall_TKAM[:, 0, number, -1]
        sized = {} if size is None else {"size": size}
        if recall_T.min() >= 0:
            assert value(rows, "ar", max_dets=1000, **sized) == pytest.approx(recall_T.mean(), abs=1e-9)
        else:
            assert not [row for row in rows if row["metric"] == "ar" and row.get("size") == size]
    assert sum("skipped" == row["metric"] for row in rows) == 1 and "annotation 99" in details["skipped"][0]
    assert not [row for row in rows if row["metric"] == "recall"], "no teacher"


def test_an_image_without_masks_of_the_teacher_is_counted_and_none_at_all_is_one_line(recipe, monkeypatch):
    made = iter([[], [], [], [_mask(0, 4)], [_mask(0, 2)], [_mask(0, 4), _mask(5, 9)]])
    monkeypatch.setattr(Everything, "of", lambda self, segmenter: next(made))
    models = {"a": student(recipe), "b": student(recipe)}
    rows, _ = Everything(limit=2).judge(recipe, models)
    assert value(rows, "without_masks", "teacher") == 1
    # image 1: nobody makes a mask; image 2: the teacher 4 rows, `a` 2 of them, `b` these 4 and 4 others
    assert value(rows, "recall", "a", iou=0.5) == 1 and value(rows, "recall", "a", iou=0.75) == 0
    assert value(rows, "matched_miou", "a") == 0.5 and value(rows, "count_ratio", "a") == 1
    assert value(rows, "recall", "b", iou=0.75) == 1 and value(rows, "count_ratio", "b") == 2
    assert value(rows, "masks", "b") == 1
    monkeypatch.setattr(Everything, "of", lambda self, segmenter: [])
    with pytest.raises(UserError, match=r"makes no mask on any of 2 images at pred_iou_thresh=0.88.*lower them"):
        Everything(limit=2).judge(recipe, models)


def _mask(first: int, last: int) -> dict:
    mask = np.zeros((10, 10), np.uint8, order="F")
    mask[first:last] = 1
    return {"segmentation": coco_mask.encode(mask), "predicted_iou": 0.9}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points_per_side": 0}, "points_per_side=0"),
        ({"stability_score_thresh": 1.5}, "stability_score_thresh=1.5"),
        ({"box_nms_thresh": -1}, "box_nms_thresh=-1"),
        ({"ious": ()}, "ious="),
        ({"ious": (0.0,)}, "ious="),
        ({"max_dets": 0}, "max_dets=0"),
        ({"limit": 0}, "limit=0"),
        ({"annotations": "x.json"}, "annotations=x.json: .* which format"),
        ({"truth": {"name": "teacher"}}, "leave truth out"),
    ],
)
def test_settings_that_measure_nothing_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        Everything(**settings)


@pytest.mark.parametrize("name", ["everything", "everything_lvis", "everything_mini"])
def test_the_protocols_load(name):
    assert isinstance(evaluate.load(f"eval/{name}.yaml").evaluator, Everything)


def test_what_cannot_be_judged_is_refused_before_work(recipe, tmp_path):
    with pytest.raises(UserError, match="everything: judges the masks of SAMs"):
        Everything().check(replace(recipe, teacher={"name": "clip_mini"}))
    missing = Everything(truth={"name": "coco"}, annotations=str(tmp_path / "missing.json"))
    with pytest.raises(UserError, match=r"missing\.json"):
        missing.check_images(recipe)
    annotated_toys.write(tmp_path, images=1, size=64)
    with pytest.raises(UserError, match="the teacher is not at hand"):
        Everything(images=annotated_toys.source(tmp_path)).judge(recipe, {"student": student(recipe)})
