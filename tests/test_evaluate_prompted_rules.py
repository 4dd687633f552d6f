"""Settings of prompts: resolutions, boxes of a detector, skips, errors, the teacher against itself, interruptions."""

import functools
import json
from pathlib import Path
from typing import Any

import annotated_toys
import numpy as np
import plain_prompts
import pytest
import sam_exports
import tiny
import torch
from plain_prompts import BASE, NAMED, decoded, plain, plain_iou, protocol
from segment_anything import SamPredictor
from torch.nn import functional as F

import fmdistill
from fmdistill import cache, distill, evaluate, recipe, stop
from fmdistill.backbones.promptable import PromptHead
from fmdistill.evaluate import prompt_rounds, prompted
from fmdistill.evaluate.clicks import Click
from fmdistill.evaluate.prompt_rounds import Answering, Target
from fmdistill.evaluate.results import value
from fmdistill.evaluate.segmenters import ImageSegmenter
from fmdistill.export import mobilesam
from fmdistill.predict.sam import WholeSam, as_sam
from fmdistill.registry import UserError
from fmdistill.report import rows as rows_of_reports


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    return plain_prompts.toys(tmp_path_factory.mktemp("prompted"))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return plain_prompts.models()


@pytest.fixture(scope="module")
def loaded():
    return recipe.load("recipes/mini/sam_mini.yaml")


def test_at_low_resolution_masks_are_compared_on_the_grid_of_the_logits(toys, models, loaded):
    model, scores = models["worse"], []
    rows, _ = protocol("coco_boxes", toys, resolution="low", crowd="keep", limit=1).judge(loaded, {"worse": model})
    stored, predictor = json.loads((toys / "coco.json").read_text()), SamPredictor(as_sam(model, model.head))
    for record in stored["images"][:1]:
        predictor.set_image(annotated_toys.pixels(toys, record))
        h, w = predictor.input_size
        for annotation in (a for a in stored["annotations"] if a["image_id"] == record["id"]):
            truth = decoded(annotation, (record["height"], record["width"]))
            x, y, width, height = annotation["bbox"]
            _, predicted, lows = predictor.predict(box=np.array([x, y, x + width, y + height]))
            shares = F.interpolate(torch.from_numpy(truth)[None, None].float(), (h, w), mode="bilinear", antialias=True)
            cells = [
                [float(shares[0, 0, r : r + 4, c : c + 4].mean()) > 0.5 for c in range(0, w, 4)] for r in range(0, h, 4)
            ]
            low = lows[predicted.argmax()][: int(np.ceil(h / 4)), : int(np.ceil(w / 4))] > 0
            scores.append(plain_iou(np.array(cells), low))
    assert value(rows, "miou", "worse") == pytest.approx(np.mean(scores), abs=1e-3)


def test_low_resolution_clicks_lie_on_the_centres_of_cells(models):
    """Cells of 4 px of the input, which is 1.28 times the image."""
    head = models["worse"].head
    segmenter = ImageSegmenter(head, torch.zeros(128, 16, 16), (100, 200), (128, 256))
    low = Answering(resolution="low")
    scale = 4 / 1.28
    click = prompt_rounds._in_image(low, segmenter, Click(10, 3, False))
    assert click == pytest.approx(((10 + 0.5) * scale - 0.5, (3 + 0.5) * scale - 0.5, False))
    target = Target(0, 9.0, np.zeros((100, 200), bool), first=Click(click.x, click.y, True))
    assert prompt_rounds._state(low, segmenter, target).clicked == [(10, 3)]
    assert prompt_rounds._in_image(Answering(), segmenter, Click(10, 3, False)) == (10, 3, False)


def test_a_detector_s_boxes_replace_the_annotated_ones_by_id(toys, models, loaded, tmp_path):
    stored = json.loads((toys / "coco.json").read_text())
    chosen = [a for a in stored["annotations"] if not a["iscrowd"]][1:]
    boxes = [{"id": a["id"], "bbox": [a["bbox"][0] - 2, *a["bbox"][1:]], "score": 0.5} for a in chosen]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    chosen_protocol = protocol("coco_boxes", toys, boxes=str(tmp_path / "boxes.json"))
    rows, details = chosen_protocol.judge(loaded, {"worse": models["worse"]})
    for annotation in stored["annotations"]:
        annotation["bbox"][0] -= 2
    stored["annotations"] = [a for a in stored["annotations"] if a["id"] in {b["id"] for b in boxes}]
    (tmp_path / "coco.json").write_text(json.dumps(stored))
    moved = protocol("coco_boxes", toys, annotations=str(tmp_path / "coco.json"))
    again, _ = moved.judge(loaded, {"worse": models["worse"]})
    assert value(rows, "miou", "worse") == value(again, "miou", "worse")
    counted = {row["reason"]: row["value"] for row in rows if row["metric"] == "skipped"}
    assert counted == {"no box": 1, "crowd": 3}
    assert sum(line.startswith("no box: train-all/") for line in details["skipped"]) == 1
    for text in ("[3]", "{", '[{"id": 1, "bbox": [1, 2, 3]}]', '[{"id": 1, "bbox": [1, 2, 3, NaN]}]'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="boxes=.*bad.json: ") as caught:
            prompted.read_boxes(str(tmp_path / "bad.json"))
        assert "\n" not in str(caught.value)


def test_what_cannot_be_judged_is_counted_by_reason_and_all_else_is(toys, models, loaded, tmp_path):
    stored = json.loads((toys / "coco.json").read_text())
    own = [a for a in stored["annotations"] if not a["iscrowd"]]
    own[0]["area"] = 0.5
    own[1]["segmentation"]["size"] = [3, 3]
    own[2]["segmentation"] = annotated_toys.listed(np.zeros((1, 1), bool))
    stored["images"][2]["width"] += 1
    (tmp_path / "coco.json").write_text(json.dumps(stored))
    evaluator = protocol("coco_boxes", toys, annotations=str(tmp_path / "coco.json"))
    rows, details = evaluator.judge(loaded, {"worse": models["worse"]})
    counted = {row["reason"]: row["value"] for row in rows if row["metric"] == "skipped"}
    left = [a for a in own[3:] if a["image_id"] != 12]
    assert counted == {"crowd": 2, "tiny": 1, "mask malformed": 2, "image of another size": 1}
    assert next(r for r in rows if r["metric"] == "miou")["count"] == len(left)
    assert len(details["skipped"]) == 6 and all("\n" not in line for line in details["skipped"])
    nothing = [a for a in stored["annotations"] if a["iscrowd"]]
    (tmp_path / "coco.json").write_text(json.dumps({**stored, "annotations": nothing}))
    with pytest.raises(UserError, match="no objects to judge on 3 annotated images; skipped 3, first: crowd"):
        evaluator.judge(loaded, {"worse": models["worse"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clicks": []}, "clicks=.*prompt=click needs numbers from 1 on"),
        ({"clicks": [0]}, "prompt=click needs numbers from 1 on"),
        ({"clicks": [-1], "prompt": "box"}, "prompt=box needs numbers from 0 on"),
        ({"limit": 0}, "limit=0: needs at least 1"),
        ({"images": "0"}, "limit=0: needs at least 1"),
        ({"per_image": 0}, "per_image=0"),
        ({"boxes": "x.json"}, "would be ignored by prompt=click"),
        ({"against": "teacher", "resolution": "low"}, "set resolution=original"),
        ({"seed": -1}, "seed=-1"),
        ({"dataset": "coco"}, "dataset=coco: unknown"),
        ({"truth": {"name": "x"}}, "truth.name: unknown name 'x'"),
        ({"first_click": "centre"}, "first_click='centre': unknown"),
    ],
)
def test_settings_that_measure_nothing_are_refused_by_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluate.load("eval/sa1b_clicks.yaml", settings)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("eval/sa1b_clicks.yaml")


def test_a_number_as_images_limits_them():
    assert evaluate.load("eval/sa1b_clicks.yaml", {"images": "7"}).evaluator.limit == 7
    coco_boxes = evaluate.load("eval/coco_boxes.yaml", {"images": "7"}).evaluator
    assert coco_boxes.limit == 7 and coco_boxes.images["name"] == "folder"
    assert evaluate.load("eval/sam_grid_quick.yaml", {"images": "7"}).evaluator.images == 7


def test_published_figures_stand_beside_their_own_protocol_alone(monkeypatch):
    monkeypatch.setattr(rows_of_reports, "read_published", functools.cache(rows_of_reports.read_published))
    for name in NAMED:
        stored = json.loads(json.dumps(evaluate.load(f"eval/{name}.yaml").to_json()))
        tables = rows_of_reports.published(stored)
        assert len(tables) == Path(f"eval/published/{name}.yaml").is_file(), name
        for change in ({"dataset": None}, {"select": "oracle"}, {"limit": 9}, {"crowd": "x"}, {"widen_truth": 3}):
            assert rows_of_reports.published({**stored, **change}) == []


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A finished toy run with its cache."""
    finished = tiny.load(tmp_path_factory.mktemp("ran"), "train.steps=1")
    cache.run(finished)
    distill.run(finished)
    return finished


@pytest.mark.parametrize("name", NAMED)
def test_the_teacher_against_itself_is_exactly_one_in_every_protocol(ran, name):
    overrides = {
        "truth": {"name": "teacher", "grid": 2},
        "annotations": None,
        "dataset": None,
        "images": None,
        "limit": 2,
    }
    evaluator = evaluate.load(f"eval/{name}.yaml", {**overrides, "against": "teacher", "crowd": "keep"}).evaluator
    student = distill.load_student(ran.out, trust=True)
    rows, _ = evaluator.judge(ran, {"student": student})
    values = {row["subject"]: [] for row in rows}
    for row in rows:
        if row["metric"].startswith("miou"):
            values[row["subject"]].append(row["value"])
    assert set(values["teacher"]) == {1.0} and max(values["student"]) < 1


def test_the_teacher_s_masks_as_truth_are_met_by_the_teacher_from_their_own_points(ran):
    settings = {"truth": {"name": "teacher", "grid": 3}, "first_click": "point", "clicks": [1], "limit": 3}
    evaluator = evaluate.load("eval/sa1b_clicks.yaml", settings).evaluator
    rows, _ = evaluator.judge(ran, {"student": distill.load_student(ran.out, trust=True)})
    assert value(rows, "miou", "teacher", clicks=1) == pytest.approx(1, abs=1e-3)
    assert value(rows, "miou", clicks=1) < 0.99


def test_an_interrupted_evaluation_goes_on_with_the_remaining_images(ran, tmp_path, monkeypatch):
    path = tmp_path / "own.yaml"
    path.write_text("name: prompted_miou\ntruth: {name: teacher, grid: 2}\nprompt: click\nclicks: [1, 2]\nlimit: 5\n")
    whole = evaluate.run(path, ran.out, ["trust=true"])
    result = Path(ran.out) / "evaluation/own.json"
    expected, judge_image, calls = json.loads(result.read_text()), prompted._judge, []

    def interrupted(protocol, image, *rest):
        calls.append(image.name)
        if len(calls) == 3:
            raise stop.Stopped(15)
        return judge_image(protocol, image, *rest)

    monkeypatch.setattr(prompted, "_judge", interrupted)
    result.unlink()
    with pytest.raises(stop.Stopped):
        evaluate.run(path, ran.out, ["trust=true"])
    assert len(result.with_suffix(".partial.jsonl").read_text().splitlines()) == 3
    assert evaluate.run(path, ran.out, ["trust=true"]) == whole
    assert json.loads(result.read_text()) == expected and len(calls) == 3 + 3 and len(set(calls)) == 5


def test_a_foreign_checkpoint_is_judged_by_its_own_decoder_without_a_cache(toys, tmp_path, models):
    path = tmp_path / "mobile_sam.pt"
    mobilesam.export(*sam_exports.mini(), path)
    given = ["recipe=recipes/sam/mobilesam.yaml", "clicks=[1,2]", "limit=1", f"annotations={toys}/images"]
    images = [f"images.{name}={entry}" for name, entry in annotated_toys.source(toys).items()]
    rows = evaluate.run("eval/sa1b_clicks.yaml", path, [*given, *images])
    assert {row["subject"] for row in rows} == {"student"} and 0 < value(rows, "miou", clicks=2) < 1
    sam = fmdistill.load(path).as_sam()
    model = WholeSam(sam.image_encoder, PromptHead.from_sam(sam))
    expected = plain(toys, model, {**BASE, "least": 1})
    names = [f"train-all/{number:012d}.png" for number in range(1)]
    scores = [s[0] for s in expected[1] if s[2] in names]
    assert value(rows, "miou", clicks=1) == pytest.approx(np.mean(scores), abs=1e-3)
