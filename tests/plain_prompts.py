"""The protocols of prompts as plain loops over segment_anything's SamPredictor, and the toys that they are run on."""

import json
import zlib
from pathlib import Path
from typing import Any

import annotated_toys
import numpy as np
import pytest
import torch
from pycocotools import mask as coco
from scipy import ndimage
from segment_anything import SamPredictor
from torch.nn import functional as F

from fmdistill import evaluate
from fmdistill.evaluate.results import value
from fmdistill.mini.sam import sam_mini_student
from fmdistill.predict.sam import as_sam

N = 64  # sam_mini's logits a side, of 256 px


def toys(folder: Path) -> Path:
    """Write the toys into the folder and return it."""
    annotated_toys.write(folder, images=3, objects=(2, 4))
    return folder


def models() -> dict[str, Any]:
    """Return sam_mini as shipped, and one with noise in its encoder."""
    worse: Any = sam_mini_student("packaged")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in worse.encoder.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return {"packaged": sam_mini_student("packaged").eval(), "worse": worse.eval()}


def protocol(name: str, toys: Path, **overrides):
    """Return a protocol of eval/ for the toys."""
    file = "coco.json" if name.split("_")[-1] in ("boxes",) or "coco" in name or "lvis" in name else "images"
    settings = {"images": annotated_toys.source(toys), "annotations": str(toys / file), "dataset": None, **overrides}
    if "lvis" in name:
        settings["truth"] = {"name": "coco"}  # the same file, without LVIS's fields, which mIoU does not use
    return evaluate.load(f"eval/{name}.yaml", settings).evaluator


def plain_iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 1.0


def decoded(annotation: dict, shape: tuple[int, int]) -> np.ndarray:
    rle = annotation["segmentation"]
    if isinstance(rle["counts"], list):
        rle = coco.frPyObjects(rle, *shape)
    return coco.decode(rle).astype(bool)


def next_click(truth: np.ndarray, mask: np.ndarray, clicked: np.ndarray):
    """RITM's clicker: distances over the whole padded image."""
    depths = []
    for region in (truth & ~mask, mask & ~truth):
        depths.append(np.asarray(ndimage.distance_transform_edt(np.pad(region, 1)))[1:-1, 1:-1] * ~clicked)
    positive = depths[0].max() > depths[1].max()
    depth = depths[0] if positive else depths[1]
    y, x = (int(places[0]) for places in np.where(depth == depth.max()))
    return None if depth.max() == 0 else (x, y, int(positive))


def edge_truth(mask: np.ndarray, resized: tuple[int, int]) -> tuple[np.ndarray, torch.Tensor]:
    """EdgeSAM's truth: nearest to the input, bilinear back, above 0; and the padded mask at the input."""
    at_input = F.interpolate(torch.from_numpy(mask)[None, None].float(), resized, mode="nearest")
    back = F.interpolate(at_input, mask.shape, mode="bilinear", align_corners=False)[0, 0].numpy() > 0
    return back, F.pad(at_input, (0, 256 - resized[1], 0, 256 - resized[0]))


def edge_click(low: np.ndarray, at_input: torch.Tensor, resized: tuple[int, int], rng):
    """EdgeSAM's next click, in pixels of the input."""
    valid = torch.zeros(1, 1, 256, 256)
    valid[..., : resized[0], : resized[1]] = 1
    down = [F.interpolate(x, (N, N), mode="bilinear", align_corners=False)[0, 0] for x in (valid, at_input)]
    mask, gt = torch.from_numpy(low > 0) * down[0], (down[1] > 0) * down[0]
    missing, more = (mask != gt) & (gt == 1), (mask != gt) & (gt == 0)
    drawn = rng.random((N, N))
    cells = [(y, x) for y in range(N) for x in range(N) if missing[y, x] or more[y, x]]
    if len(cells) < 10:
        return None
    y, x = max(cells, key=lambda cell: drawn[cell])
    return x * 4, y * 4, int(missing[y, x])


def kept(annotations: list[dict], rules: dict) -> list[dict]:
    return [a for a in annotations if not (a["iscrowd"] and rules["crowd"] == "drop") and a["area"] >= rules["least"]]


def plain(toys: Path, model: Any, rules: dict) -> dict[int, list[tuple[float, float, str]]]:
    """Score by one `predict` for every prompt; return (IoU, area, image) of each instance by number of clicks."""
    stored = json.loads((toys / "coco.json").read_text())
    predictor = SamPredictor(as_sam(model, model.head))
    scores: dict[int, list] = {count: [] for count in rules["clicks"]}
    for number, record in enumerate(stored["images"]):
        pixels = annotated_toys.pixels(toys, record)
        predictor.set_image(pixels)
        shape, resized = pixels.shape[:2], predictor.input_size
        name = f"train-all/{number:012d}.png"
        own = kept([a for a in stored["annotations"] if a["image_id"] == record["id"]], rules)
        if rules.get("most") and len(own) > rules["most"]:
            rng = np.random.default_rng([0, zlib.crc32(name.encode())])
            own = [own[i] for i in rng.integers(len(own), size=rules["most"])]
        for place, annotation in enumerate(own):
            for count, iou in plain_instance(predictor, annotation, place, name, shape, resized, rules).items():
                scores[count].append((iou, annotation["area"], name))
    return scores


def plain_instance(predictor, annotation, place, name, shape, resized, rules) -> dict[int, float]:
    truth = mask = decoded(annotation, shape)
    at_input = None
    if rules.get("edge"):
        truth, at_input = edge_truth(mask, resized)
    x, y, width, height = annotation["bbox"]
    box, points, labels = None, [], []
    clicked = np.zeros(shape, bool)
    if rules["prompt"] == "box":
        box = np.array([x, y, x + width, y + height])
    else:
        if rules["first"] == "point":
            click = (*annotation["point_coords"][0], 1)
        elif rules["first"] == "box_centre":
            click = (x + width / 2, y + height / 2, 1)
        elif at_input is not None:
            cx, cy, _ = next_click(at_input[0, 0].numpy() > 0, np.zeros((256, 256), bool), np.zeros((256, 256), bool))
            click = (cx * shape[1] / resized[1], cy * shape[0] / resized[0], 1)
        else:
            click = next_click(truth, np.zeros(shape, bool), clicked)
        clicked[int(click[1]), int(click[0])] = True
        points, labels = [click[:2]], [click[2]]
    ious, low, count, scores = 0.0, None, len(points), {}
    more = True
    while True:
        if more:
            feed = low[None] if rules.get("feed") and low is not None else None
            given = (np.array(points), np.array(labels)) if points else (None, None)
            masks, predicted, lows = predictor.predict(*given, box, feed, multimask_output=rules["choice"] != "first")
            if rules["choice"] == "oracle":
                best = int(np.argmax([plain_iou(m, truth) for m in masks]))
            else:
                best = int(predicted.argmax())
            ious, low, mask = plain_iou(masks[best], truth), lows[best], masks[best]
        if count in rules["clicks"]:
            scores[count] = ious
        if count == max(rules["clicks"]):
            return scores
        more = more and ious < 1
        if more and rules.get("edge"):
            seeds = (0, zlib.crc32(name.encode()), place, len(points))
            click = edge_click(low, at_input, resized, np.random.default_rng(seeds))
            if click:
                click = (click[0] * shape[1] / resized[1], click[1] * shape[0] / resized[0], click[2])
        elif more:
            click = next_click(truth, mask, clicked)
        more = more and click is not None
        if more:
            points, labels = [*points, click[:2]], [*labels, click[2]]
            clicked[int(click[1]), int(click[0])] = True
        count += 1


EDGE = {"choice": "first", "crowd": "drop", "least": 0, "edge": True, "first": "mask_centre"}
EFFICIENTVIT = {"choice": "predicted", "crowd": "keep", "least": 1, "first": "mask_centre"}
BASE = {"prompt": "click", "clicks": [1, 2], "crowd": "keep", "least": 0, "first": "mask_centre", "choice": "predicted"}
NAMED: dict[str, dict] = {
    "coco_boxes": {"prompt": "box", "clicks": [0], "choice": "predicted", "crowd": "drop", "least": 1},
    "lvis_boxes": {"prompt": "box", "clicks": [0], "choice": "predicted", "crowd": "drop", "least": 1},
    "sa1b_clicks": {**EFFICIENTVIT, "prompt": "click", "clicks": [1, 3, 5]},
    "efficientvit_sam_coco_box": {**EFFICIENTVIT, "prompt": "box", "clicks": [0]},
    "efficientvit_sam_lvis_box": {**EFFICIENTVIT, "prompt": "box", "clicks": [0]},
    "efficientvit_sam_coco_click": {**EFFICIENTVIT, "prompt": "click", "clicks": [1]},
    "efficientvit_sam_lvis_click": {**EFFICIENTVIT, "prompt": "click", "clicks": [1]},
    "edgesam_coco_box": {**EDGE, "prompt": "box", "clicks": [0, 1, 2]},
    "edgesam_coco_click": {**EDGE, "prompt": "click", "clicks": [1, 2, 3]},
    "edgesam_lvis_box": {**EDGE, "prompt": "box", "clicks": [0]},
    "edgesam_lvis_click": {**EDGE, "prompt": "click", "clicks": [1]},
    "edgesam_sa1k_box": {**EDGE, "prompt": "box", "clicks": [0, 1, 2], "most": 1},
    "edgesam_sa1k_click": {**EDGE, "prompt": "click", "clicks": [1, 2, 3], "most": 1},
    "slimsam_sa1b_point": {
        "prompt": "click",
        "first": "point",
        "clicks": [1],
        "choice": "first",
        "crowd": "keep",
        "least": 0,
    },
}


def check_equal(rows, name: str, expected: dict[int, list[tuple[float, float, str]]]) -> None:
    for count, scores in expected.items():
        dimensions = {} if list(expected) == [0] else {"clicks": count}
        iou, area = np.array([s[0] for s in scores]), np.array([s[1] for s in scores])
        assert value(rows, "miou", name, **dimensions) == pytest.approx(iou.mean(), abs=1e-4)
        images = [np.mean([s[0] for s in scores if s[2] == image]) for image in dict.fromkeys(s[2] for s in scores)]
        assert value(rows, "miou_per_image", name, **dimensions) == pytest.approx(np.mean(images), abs=1e-4)
        for size, low, high in (("small", 0, 1024), ("medium", 1024, 9216), ("large", 9216, 1e9)):
            members = iou[(area >= low) & (area <= high)]
            stated = [r for r in rows if r["subject"] == name and r.get("size") == size and r.get("clicks", 0) == count]
            assert len(stated) == bool(len(members))
            if len(members):
                assert stated[0]["value"] == pytest.approx(members.mean(), abs=1e-4)
                assert stated[0]["count"] == len(members)
