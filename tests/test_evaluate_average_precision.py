"""coco_ap: equal to a plain loop over SamPredictor and pycocotools, and resumed as if it had not been interrupted."""

import contextlib
import functools
import io
import json
import math
from pathlib import Path

import coco_sets
import numpy as np
import pytest
import tiny
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import fmdistill
from fmdistill import cache, distill, evaluate, stop
from fmdistill.evaluate import results
from fmdistill.evaluate.average_precision import CocoAp, paired
from fmdistill.evaluate.stored_results import Partial
from fmdistill.images import build
from fmdistill.mini.sam import PACKAGED
from fmdistill.predict.checkpoint_file import whole_sam
from fmdistill.registry import UserError
from fmdistill.report import rows as reports

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100", "ARs@100", "ARm@100", "ARl@100"]
SETS = {"scenes": coco_sets.scenes, "photographs": coco_sets.photographs}


def by_hand(folder, annotations: str, boxes: str, select: str, score: str) -> np.ndarray:
    """COCO's twelve figures, from the plain loop that the protocols describe."""
    predictor, images = fmdistill.load(PACKAGED), {"name": "folder", "root": str(folder / "images"), "validation": 0}
    source = build(images)
    pixels = {encoded.key: source.decode(encoded, s.name) for s in source.shards() for encoded in source.read(s)}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        found, last = sorted(json.loads(Path(boxes).read_text()), key=lambda one: one["image_id"]), None
        for detection in found:
            if detection["image_id"] != last:
                last = detection["image_id"]
                stem = Path(truth.imgs[last]["file_name"]).stem
                predictor.set_image(next(p for key, p in pixels.items() if Path(key).stem == stem))
            x, y, width, height = detection.pop("bbox")
            box = np.array([x, y, x + width, y + height])
            masks, predicted, _ = predictor.predict(box=box, multimask_output=select == "best_predicted")
            best = int(np.argmax(predicted))
            detection["segmentation"] = coco_mask.encode(np.asfortranarray(masks[best].astype(np.uint8)))
            detection["score"] *= float(predicted[best]) if score == "product" else 1
        evaluation = COCOeval(truth, truth.loadRes(found), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.where(evaluation.stats < 0, np.nan, evaluation.stats)


def protocol(folder, paths: tuple[str, str], **settings) -> CocoAp:
    images = {"name": "folder", "root": str(folder / "images"), "validation": 0}
    given = {"truth": {"name": "coco"}, "annotations": paths[0], "boxes": paths[1], **settings}
    return CocoAp(images=images, device="cpu", boxes_per_batch=5, **given)


@pytest.mark.parametrize(
    "name, select, score",
    [
        ("scenes", "best_predicted", "detector"),
        ("photographs", "best_predicted", "detector"),
        ("photographs", "single", "product"),
    ],
)
def test_figures_equal_a_plain_loop_over_the_predictor_and_pycocotools(tmp_path, name, select, score):
    paths = SETS[name](tmp_path)
    rows, details = protocol(tmp_path, paths, select=select, score=score).judge(
        tiny.load(tmp_path), {"student": whole_sam(PACKAGED)}
    )
    figures = {row["metric"]: row["value"] for row in rows}
    expected = dict(zip(NAMES, by_hand(tmp_path, *paths, select, score), strict=True))
    assert figures["AP"] > 0.1 and "skipped" not in figures
    assert {n for n in NAMES if n in figures} == {n for n in NAMES if not math.isnan(expected[n])}
    for metric in NAMES:
        if metric in figures:
            assert figures[metric] == pytest.approx(expected[metric], abs=1e-4), metric
    row = next(row for row in rows if row["metric"] == "AP")
    assert row["low"] <= row["value"] <= row["high"] and row["count"] == 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recipe with cache and run, and COCO's JSON of its validation images with one box of two halves each."""
    folder = tmp_path_factory.mktemp("ap")
    recipe = tiny.load(folder, "train.steps=1", "teacher.exact=true")
    cache.run(recipe)
    distill.run(recipe)
    dataset: dict = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "half"}]}
    images = build(recipe.images)
    keys = [e.key for s in images.shards() if s.split == "validation" for e in images.read(s)]
    sizes = [images.decode(e, s.name).shape for s in images.shards() if s.split == "validation" for e in images.read(s)]
    for number, (key, (height, width, _)) in enumerate(zip(keys, sizes, strict=True), start=1):
        dataset["images"].append({"id": number, "file_name": f"{key}.jpg", "height": height, "width": width})
        for x in (0, width // 2):
            box, count = [x, 0, width // 2, height], len(dataset["annotations"])
            outline = [x, 0, x + width // 2, 0, x + width // 2, height, x, height]
            one = {"id": count + 1, "image_id": number, "category_id": 3, "bbox": box, "segmentation": [outline]}
            dataset["annotations"].append(one | {"area": box[2] * box[3], "iscrowd": 0})
    (folder / "halves.json").write_text(json.dumps(dataset))
    return recipe, str(folder / "halves.json")


def test_teacher_and_students_are_scored_in_one_pass_by_the_boxes_of_the_objects(run):
    recipe, annotations = run
    students = {"student": distill.load_student(recipe.out, trust=True)}
    rows, details = CocoAp({"name": "coco"}, annotations, device="cpu", boundary=True, write_masks=True).judge(
        recipe, students
    )
    assert {row["subject"] for row in rows} == {"student", "teacher"}
    assert {row["metric"] for row in rows} >= {"AP", "boundary_AP", "boundary_AP50", "AR@100"}
    for subject in ("student", "teacher"):
        assert results.value(rows, "boundary_AP", subject) <= results.value(rows, "AP", subject)
        assert results.value(rows, "AR@100", subject) >= results.value(rows, "AP", subject)
    assert len(details["masks"]) == 2 * 16 and {one["score"] for one in details["masks"]} == {1.0}
    teacher, student = (next(e for e in details["resampled"] if e["subject"] == s) for s in ("teacher", "student"))
    low, high = paired(student, teacher)
    assert low <= results.value(rows, "AP") - results.value(rows, "AP", "teacher") <= high
    assert paired(student, student) == (0, 0)
    assert paired(student, {**teacher, "images": "others"}) is None


def test_a_truth_without_classes_is_matched_without_them(run):
    recipe, _ = run
    settings = {"truth": {"name": "teacher", "grid": 2}, "write_masks": True, "device": "cpu"}
    rows, details = CocoAp(**settings).judge(recipe, {"student": distill.load_student(recipe.out, trust=True)})
    # the boxes of its masks are other prompts than their points, so that even the teacher misses some
    assert 0 < results.value(rows, "AP", "teacher") <= 1
    assert {one["category_id"] for one in details["masks"]} == {1}


def test_an_interrupted_evaluation_goes_on_where_it_was(run, tmp_path, monkeypatch):
    recipe, annotations = run
    students = {"student": distill.load_student(recipe.out, trust=True)}
    evaluator = CocoAp({"name": "coco"}, annotations, device="cpu")
    whole, _ = evaluator.judge(recipe, students)
    seen, path = [], tmp_path / "partial.jsonl"
    from fmdistill.evaluate import average_precision

    plain = average_precision.segment

    def counting(image, *rest):
        if len(seen) == 3:
            raise stop.Stopped(2)
        seen.append(image.name)
        return plain(image, *rest)

    monkeypatch.setattr(average_precision, "segment", counting)
    with pytest.raises(stop.Stopped):
        evaluator.judge(recipe, students, Partial.open(path, {}))
    monkeypatch.setattr(
        average_precision, "segment", lambda image, *rest: (seen.append(image.name), plain(image, *rest))[1]
    )
    again, _ = evaluator.judge(recipe, students, Partial.open(path, {}))
    assert again == whole and len(seen) == len(set(seen)) == 8


def test_lvis_rules_come_with_its_truth(tmp_path):
    annotations, boxes = coco_sets.scenes(tmp_path, count=2)
    stored = json.loads(Path(annotations).read_text())
    for category, frequency in zip(stored["categories"], "rf", strict=True):
        category["frequency"] = frequency
    first = stored["images"][0]["id"]
    stored["annotations"] = [a for a in stored["annotations"] if a["image_id"] != first or a["category_id"] == 1]
    for image in stored["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    Path(annotations).write_text(json.dumps(stored))
    asked = [b for b in json.loads(Path(boxes).read_text()) if b["image_id"] == first]
    settings = {"truth": {"name": "lvis"}, "max_dets": (300,), "write_masks": True}
    rows, details = protocol(tmp_path, (annotations, boxes), **settings).judge(
        tiny.load(tmp_path), {"student": whole_sam(PACKAGED)}
    )
    assert {row["metric"] for row in rows} >= {"AP", "APr", "APf", "AR@300"} and "APc" not in {
        r["metric"] for r in rows
    }
    # nobody stated whether the first image holds the second class: its boxes are not even segmented
    segmented = [one for one in details["masks"] if one["image_id"] == first]
    assert {b["category_id"] for b in asked} == {1, 2} and {one["category_id"] for one in segmented} == {1}


def test_what_is_left_out_is_counted_and_a_wrong_setting_refused(tmp_path):
    annotations, boxes = coco_sets.scenes(tmp_path)
    stored = json.loads(Path(annotations).read_text())
    stored["images"][0]["height"] += 1
    stored["annotations"][-1]["segmentation"] = {"size": [3, 3], "counts": [9]}
    Path(annotations).write_text(json.dumps(stored))
    entries = json.loads(Path(boxes).read_text())
    Path(boxes).write_text(json.dumps([*entries, {**entries[0], "score": float("nan")}]))
    rows, details = protocol(tmp_path, (annotations, boxes)).judge(
        tiny.load(tmp_path), {"student": whole_sam(PACKAGED)}
    )
    reasons = {"image of another size", "mask malformed", "a score that is not finite"}
    assert {row["reason"]: row["value"] for row in rows if row["metric"] == "skipped"} == dict.fromkeys(reasons, 1)
    assert len(details["skipped"]) == 2 and {row["count"] for row in rows if row["metric"] == "AP"} == {2}
    coco, nothing = {"name": "coco"}, {"student": whole_sam(PACKAGED)}
    for settings, message in [
        ({"max_dets": (10, 1)}, "ascending"),
        ({"max_dets": ()}, "max_dets"),
        ({"dilation": 0.0}, "dilation=0.0"),
        ({"limit": 0}, "limit=0"),
        ({"detector": "vitdet"}, "detector=vitdet: whose boxes"),
        ({"dataset": "coco_val2071"}, "Did you mean 'coco_val2017'"),
    ]:
        with pytest.raises(UserError, match=message):
            CocoAp(coco, **settings)
    with pytest.raises(UserError, match="boxes=gone.json: no such file"):
        CocoAp(coco, annotations, boxes="gone.json").check_images(tiny.load(tmp_path))
    with pytest.raises(UserError, match="annotations=none: no such file"):
        CocoAp(coco).check_images(tiny.load(tmp_path))
    with pytest.raises(UserError, match="has 5000 images and 36781 annotations, these annotations have"):
        protocol(tmp_path, (annotations, boxes), dataset="coco_val2017").judge(tiny.load(tmp_path), nothing)
    labels = {"truth": {"name": "labels"}, "annotations": None}
    with pytest.raises(UserError, match="are joined with images by COCO's ids"):
        protocol(tmp_path, (annotations, boxes), **labels).judge(tiny.load(tmp_path), nothing)


def test_a_result_of_the_command_is_stored_with_how_its_figures_read(tmp_path):
    annotations, boxes = coco_sets.scenes(tmp_path, count=2)
    tiny.write(tmp_path)
    (tmp_path / "ap.yaml").write_text("name: coco_ap\ntruth: {name: coco}\ndevice: cpu\n")
    sam = tmp_path / "sam.safetensors"
    sam.write_bytes(PACKAGED.read_bytes())
    images = [f"images.{k}={v}" for k, v in {"name": "folder", "root": tmp_path / "images", "validation": 0}.items()]
    paths = [f"recipe={tmp_path / 'tiny.yaml'}", f"annotations={annotations}", f"boxes={boxes}"]
    rows = evaluate.run(tmp_path / "ap.yaml", sam, [*images, *paths])
    stored = results.read(tmp_path / "sam.evaluation" / "ap.json")
    assert stored is not None and stored.rows == rows
    assert stored.metric("AP").percent and stored.metric("AR@100").label == "AR@100"


PUBLISHED = {
    "coco_ap_vitdet": ["efficientvit_sam_coco_ap"],
    "lvis_ap_vitdet": ["efficientvit_sam_lvis_ap"],
    "tinysam_coco_ap": ["tinysam_coco_ap"],
    "tinysam_lvis_ap": ["tinysam_lvis_ap"],
    "edgesam_coco_ap": ["edgesam_coco_ap"],
    "repvitsam_coco_ap": ["prompt_segment_anything_coco_ap", "repvitsam_coco_ap"],
}


def test_published_figures_stand_beside_their_own_protocol_alone(monkeypatch):
    monkeypatch.setattr(reports, "read_published", functools.cache(reports.read_published))
    known = set(CocoAp({"name": "coco"}).metrics)
    for name, tables in PUBLISHED.items():
        stored = json.loads(json.dumps(evaluate.load(f"eval/{name}.yaml").to_json()))
        expected = [reports.read_published(Path(f"eval/published/{table}.yaml")) for table in tables]
        assert reports.published(stored) == expected
        assert {metric for table in expected for row in table.rows for metric, _ in row.cells} <= known
        for change in ({"dataset": None}, {"detector": None}, {"limit": 9}, {"classes": False}, {"max_dets": [7]}):
            assert reports.published({**stored, **change}) == []
        if name == "tinysam_coco_ap":
            single = reports.read_published(Path("eval/published/tinysam_coco_ap_single.yaml"))
            assert reports.published({**stored, "select": "single"}) == [single]
