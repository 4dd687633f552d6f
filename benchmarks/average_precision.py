"""Measure what each choice of an AP protocol alone changes, and what scoring costs.

    python benchmarks/average_precision.py choices [IMAGES]     # AP of sam_mini on generated scenes
    python benchmarks/average_precision.py scoring [IMAGES]     # seconds of scoring random masks of 480 x 640

The scenes and their annotations are those of mask_choices.py, in three classes. The boxes are those of a made-up
detector: each object's, moved by a normal deviate of 5 % of its size, with a wrong class one time in ten, and five
boxes of nothing an image; scores are uniform, halved for the wrong ones. Differences are to the first line, with the
95 % interval of the same 200 resamples of the images.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mask_choices
import numpy as np

from fmdistill import evaluate, recipe
from fmdistill.evaluate.average_precision import RESAMPLED, paired
from fmdistill.evaluate.masks import to_rle
from fmdistill.evaluate.matching import Rules
from fmdistill.evaluate.precision import Precision
from fmdistill.mini.sam import sam_mini_student

IMAGES = {"choices": 48, "scoring": 200}
CLASSES = 3
CHOICES: dict[str, dict[str, Any]] = {
    "detector's boxes, best predicted mask, detector's score": {},
    "mask 0": {"select": "single"},
    "score times predicted IoU": {"score": "product"},
    "mask 0, score times predicted IoU": {"select": "single", "score": "product"},
    "any class matches": {"classes": False},
    "annotated boxes, score 1": {"boxes": None, "detector": None},
}


def write_boxes(folder: Path) -> None:
    """Give the annotations three classes, and write boxes.json beside them."""
    generator, boxes = np.random.default_rng(0), []
    stored = json.loads((folder / "coco.json").read_text())
    stored["categories"] = [{"id": number, "name": str(number)} for number in range(1, CLASSES + 1)]
    for one in stored["annotations"]:
        one["category_id"] = 1 + one["id"] % CLASSES
        one["id"] += 1  # pycocotools takes an id of 0 for no match
        if not one["iscrowd"]:
            x, y, width, height = one["bbox"]
            moved = np.array(one["bbox"]) + generator.normal(0, 0.05, 4) * [width, height, width, height]
            wrong = generator.random() < 0.1
            category = int(generator.integers(1, CLASSES + 1)) if wrong else one["category_id"]
            boxes.append((one["image_id"], category, moved, generator.random() / (1 + wrong)))
    for image in stored["images"]:
        for _ in range(5):
            box = generator.uniform(0, 0.5, 4) * ([image["width"], image["height"]] * 2)
            boxes.append((image["id"], int(generator.integers(1, CLASSES + 1)), box, generator.random() / 2))
    entries = [
        {"image_id": image, "category_id": category, "bbox": [max(float(v), 0.0) for v in box], "score": float(score)}
        for image, category, box, score in boxes
    ]
    (folder / "coco.json").write_text(json.dumps(stored))
    (folder / "boxes.json").write_text(json.dumps(entries))


def choices(images: int) -> None:
    """Print a table of AP and boundary AP for each choice."""
    names = ("AP", "AP50", "AR@100", "boundary_AP")
    base: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mask_choices.write(folder, images)
        write_boxes(folder)
        source = {"name": "folder", "root": name, "validation": 0}
        own = {"annotations": str(folder / "coco.json"), "boxes": str(folder / "boxes.json"), "images": source}
        own |= {"dataset": None, "detector": "made up", "boundary": True}
        print(f"{images} images\n\n| choice | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
        for choice, settings in CHOICES.items():
            evaluator = evaluate.load("eval/coco_ap_vitdet.yaml", {**own, **settings}).evaluator
            rows, details = evaluator.judge(
                recipe.load("recipes/mini/sam_mini.yaml"), {"student": sam_mini_student("packaged")}
            )
            figures = {row["metric"]: row for row in rows}
            resampled = {entry["metric"]: entry for entry in details[RESAMPLED]}
            base = base or {"figures": figures, "resampled": resampled}
            cells = []
            for metric in names:
                cells.append(f"{100 * figures[metric]['value']:.1f}")
                if metric in resampled and base["figures"] is not figures:
                    difference = figures[metric]["value"] - base["figures"][metric]["value"]
                    low, high = paired(resampled[metric], base["resampled"][metric]) or (0.0, 0.0)
                    cells[-1] += f" ({100 * difference:+.1f}, {100 * low:+.1f} to {100 * high:+.1f})"
            print(f"| {choice} | " + " | ".join(cells) + " |", flush=True)


def scoring(images: int) -> None:
    """Print the seconds of processor time that scoring takes for 7 objects and 47 detections an image, 80 classes."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:480, :640]
    masks = []
    for _ in range(60):
        radius, cy, cx = np.exp(generator.uniform(2, 5)), generator.uniform(0, 480), generator.uniform(0, 640)
        masks.append(((y - cy) / radius) ** 2 + ((x - cx) / radius) ** 2 <= 1)
    truth, moved = [to_rle(mask) for mask in masks], [to_rle(np.roll(mask, (2, 3), (0, 1))) for mask in masks]
    made = []
    for _ in range(images):
        kinds, classes = generator.integers(len(masks), size=47), generator.integers(80, size=47)
        classes[7:27] = classes[:7][generator.integers(7, size=20)]
        objects = [
            {"category_id": int(c), "segmentation": truth[k], "area": int(masks[k].sum()), "iscrowd": 0}
            for k, c in zip(kinds[:7], classes[:7], strict=True)
        ]
        scores = generator.random(47) * np.where(np.arange(47) < 7, 1, 0.5)
        made.append((objects, [
            {"category_id": int(c), "segmentation": moved[k], "score": float(s)}
            for k, c, s in zip(kinds, classes, scores, strict=True)
        ]))  # fmt: skip
    for ratio in (None, 0.02):
        scorers: dict[str, Any] = {"pycocotools": Precision(Rules(boundary=ratio))}
        try:
            from fmdistill.evaluate.faster_precision import FasterPrecision, check_installed

            check_installed()
            scorers["faster_coco_eval"] = FasterPrecision(Rules(boundary=ratio))
        except Exception as error:
            print(error)
        found = {}
        for name, scorer in scorers.items():
            start = time.process_time()
            for objects, detections in made:
                scorer.add(objects, detections)
            found[name] = scorer.figures()
            seconds = time.process_time() - start
            print(f"boundary={ratio} {name}: {seconds:.1f} s, AP {found[name]['AP']:.6f}", flush=True)
        start = time.process_time()
        scorers["pycocotools"].resampled()
        print(f"boundary={ratio} 200 resamples: {time.process_time() - start:.1f} s", flush=True)
        if len(found) > 1:
            worst = max(abs(found["pycocotools"][k] - found["faster_coco_eval"][k]) for k in found["pycocotools"])
            print(f"boundary={ratio} largest difference of the figures: {worst:.1e}")


def main() -> None:
    """Run the measurement that the command line names."""
    kind = sys.argv[1] if len(sys.argv) > 1 else "choices"
    images = int(sys.argv[2]) if len(sys.argv) > 2 else IMAGES[kind]
    {"choices": choices, "scoring": scoring}[kind](images)


if __name__ == "__main__":
    main()
