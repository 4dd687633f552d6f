"""Automatic masks are compared as plain loops over segment_anything's generator compare them."""

import itertools
import json
from dataclasses import replace

import annotated_toys
import numpy as np
import pytest
import tiny
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from segment_anything import SamAutomaticMaskGenerator

import fmdistill
from fmdistill import cache, distill, evaluate
from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate import everything
from fmdistill.evaluate.everything import Everything, overlaps, pair
from fmdistill.evaluate.results import value
from fmdistill.evaluate.stored_results import Partial
from fmdistill.mini.sam import PACKAGED, build_sam_mini
from fmdistill.predict.checkpoint_file import whole_sam
from fmdistill.registry import UserError

LOW = {"points_per_side": 5, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 0.97}
CONFIDENT = {"points_per_side": 5, "pred_iou_thresh": 0.1, "stability_score_thresh": 0.5}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    loaded = tiny.load(tmp_path_factory.mktemp("everything"), "train.steps=1", "teacher.exact=true")
    cache.run(loaded)
    distill.run(loaded)
    return loaded


def student(recipe):
    return distill.load_student(recipe.out, trust=True)


def plain_iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum()) if (a | b).any() else 1.0


def generated(sam, pixels: np.ndarray) -> list[np.ndarray]:
    return [mask["segmentation"] for mask in SamAutomaticMaskGenerator(sam, **LOW).generate(pixels)]


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
    expected = [[plain_iou(a, b) for b in masks[2:]] for a in masks[:2]]
    assert expected[0][1] == 1
    np.testing.assert_allclose(overlaps(rles[:2], rles[2:]), expected)


def test_figures_equal_a_loop_over_segment_anything_s_generator(recipe):
    protocol = Everything(**LOW, limit=4)
    rows, details = protocol.judge(recipe, {"student": student(recipe)})
    data = CachedImages(cache.open_cache(recipe), "validation")
    teacher, own = tiny.teacher(exact=True).sam, fmdistill.load(recipe.out, trust=True).as_sam()
    paired, counts = [], []
    for number in range(4):
        pixels = data.cache.images.decode(data.encoded(0, number), data.shards[0].name)
        masks = [generated(sam, pixels) for sam in (teacher, own)]
        iou_TS = np.array([[plain_iou(a, b) for b in masks[1]] for a in masks[0]])
        paired += pair(iou_TS.reshape(len(masks[0]), len(masks[1]))).tolist()
        counts.append([len(each) for each in masks])
    made = np.sum(counts, axis=0)
    assert min(made) > 4 and 0.02 < np.mean(paired) < 0.98, "the masks are degenerate"
    for iou in (0.5, 0.75):
        assert value(rows, "recall", iou=iou) == pytest.approx(np.mean(np.array(paired) >= iou))
    matched = [one for one in paired if one >= 0.5]
    assert value(rows, "matched_miou") == pytest.approx(np.mean(matched), abs=1e-3)
    assert value(rows, "count_ratio") == pytest.approx(made[1] / made[0])
    assert value(rows, "masks") == made[1] / 4 and value(rows, "masks", "teacher") == made[0] / 4
    assert value(rows, "without_masks", "teacher") == sum(count[0] == 0 for count in counts)
    assert [image["masks"] for image in details["images"] if image["subject"] == "student"] == [c[1] for c in counts]


def test_the_teacher_against_itself_is_exactly_one(recipe, monkeypatch):
    head = tiny.teacher(exact=True)
    rows, _ = Everything(**LOW, limit=2).judge(recipe, {"student": _AsStudent(head.sam)})
    for iou in (0.5, 0.75):
        assert value(rows, "recall", iou=iou) == 1.0
    assert value(rows, "matched_miou") == pytest.approx(1.0, abs=1e-3) and value(rows, "count_ratio") == 1.0


class _AsStudent(torch.nn.Module):
    """SAM's image encoder, called as a student is."""

    def __init__(self, sam) -> None:
        super().__init__()
        self.encoder = sam.image_encoder

    def forward(self, image):
        return {"embedding": self.encoder(image)}


def test_average_recall_equals_pycocotools_on_all_images_together(recipe, tmp_path):
    coco = annotated_toys.write(tmp_path, images=3, size=96)
    coco["annotations"] += [{**coco["annotations"][-1], "id": 99, "segmentation": {"size": [1, 1], "counts": [1]}}]
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(coco))
    settings = {"truth": {"name": "coco"}, "annotations": str(path), "images": annotated_toys.source(tmp_path)}
    protocol = Everything(**CONFIDENT, **settings)
    rows, details = protocol.judge(recipe, {"student": whole_sam(PACKAGED)})
    generator = SamAutomaticMaskGenerator(build_sam_mini("packaged"), **CONFIDENT, output_mode="coco_rle")
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


def test_images_that_were_judged_before_a_stop_are_not_judged_again(recipe, tmp_path, monkeypatch):
    protocol, models = Everything(**LOW, limit=3), {"student": student(recipe)}
    whole, _ = protocol.judge(recipe, models, Partial.open(tmp_path / "x.jsonl", {}))
    partial = Partial.open(tmp_path / "x.jsonl", {})
    assert len(partial.done) == 3
    partial.done.pop(list(partial.done)[1])
    judged, judge = [], everything._judge
    monkeypatch.setattr(everything, "_judge", lambda *given: judged.append(given[1].name) or judge(*given))
    again, _ = protocol.judge(recipe, models, partial)
    assert again == whole and len(judged) == 1


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
