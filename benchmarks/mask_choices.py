"""Measure what each choice of a protocol of prompts alone changes: mask, resolution, crowds, first and next clicks.

    python benchmarks/mask_choices.py [IMAGES]

sam_mini on generated scenes of 160 px, which it enlarges 1.6 times, as SAM does COCO's images. Their masks are exact:
every object is an annotation, and all objects of an image below 1 % of it together are one more with iscrowd = 1.
Prints markdown tables of mIoU x 100 and of the difference to the first line, with its 95 % bootstrap interval over the
images, paired.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fmdistill import evaluate, recipe
from fmdistill.evaluate.intervals import PER_IMAGE, paired
from fmdistill.evaluate.masks import to_rle
from fmdistill.mini.sam import sam_mini_student
from fmdistill.mini.scenes import Scenes, decode_labels

IMAGES = 16
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "coco_boxes": {
        "box, best predicted, original, crowds dropped": {},
        "mask 0": {"select": "single"},
        "best of three against the truth": {"select": "oracle"},
        "64 x 64 grid": {"resolution": "low"},
        "crowds kept": {"crowd": "keep"},
        "truth resized and back (EdgeSAM)": {"widen_truth": True},
    },
    "sa1b_clicks": {
        "centre of the mask, best predicted, original": {},
        "mask 0": {"select": "single"},
        "best of three against the truth": {"select": "oracle"},
        "64 x 64 grid": {"resolution": "low"},
        "first click at the centre of the box": {"first_click": "box_centre"},
        "logits of the last mask fed back": {"mask_input": True},
        "next clicks at random wrong cells (EdgeSAM)": {"next_click": "random_error"},
    },
}


def annotation(number: int, image: int, mask_HW: np.ndarray, crowd: int) -> dict[str, Any]:
    """Return COCO's annotation of a mask that is not empty."""
    rows, columns = np.nonzero(mask_HW)
    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    whole = {"id": number, "image_id": image, "category_id": 1, "segmentation": to_rle(mask_HW), "iscrowd": crowd}
    return {**whole, "bbox": [float(v) for v in box], "area": float(mask_HW.sum())}


def write(folder: Path, images: int) -> None:
    """Write the scenes as PNG, and coco.json beside them."""
    scenes = Scenes(train=1, validation=images, size=160, seed=11)
    records, annotations = [], []
    for index in range(images):
        scene = scenes.encode("validation", index)
        (folder / f"{index:06d}.png").write_bytes(scene.data)
        labels_HW = decode_labels(scene.extra["labels.png"])
        height, width = labels_HW.shape
        records.append({"id": index, "file_name": f"{index:06d}.png", "height": height, "width": width})
        masks = [labels_HW == value for value in np.unique(labels_HW) if value > 0]
        small = [mask for mask in masks if mask.mean() < 0.01]
        for mask_HW, crowd in [*((mask, 0) for mask in masks), *([(np.any(small, axis=0), 1)] if small else [])]:
            annotations.append(annotation(len(annotations), index, mask_HW, crowd))
    coco = {"images": records, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    (folder / "coco.json").write_text(json.dumps(coco))


def measure(folder: Path, protocol: str, settings: dict[str, Any]) -> tuple[list[dict], list[dict]]:
    """Return the rows of mIoU over all objects, and the details of each."""
    images = {"name": "folder", "root": str(folder), "validation": 0}
    own = {"truth": {"name": "coco"}, "annotations": str(folder / "coco.json"), "images": images, "dataset": None}
    own |= {"crowd": "drop", "limit": None}
    evaluator = evaluate.load(f"eval/{protocol}.yaml", {**own, **settings}).evaluator
    rows, details = evaluator.judge(
        recipe.load("recipes/mini/sam_mini.yaml"), {"student": sam_mini_student("packaged")}
    )
    chosen = [row for row in rows if row["metric"] == "miou" and "size" not in row]
    sums = [entry for entry in details[PER_IMAGE] if entry["metric"] == "miou" and "size" not in entry]
    return chosen, sums


def main() -> None:
    """Print one table for each protocol."""
    images = int(sys.argv[1]) if len(sys.argv) > 1 else IMAGES
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), images)
        for protocol, choices in CHOICES.items():
            base: list[dict] = []
            for choice, settings in tqdm(choices.items(), protocol, disable=None):
                rows, sums = measure(Path(name), protocol, settings)
                if not base:
                    base = sums
                    labels = [f"clicks: {row['clicks']}" if "clicks" in row else "box" for row in rows]
                    print(
                        f"\n{images} images, {rows[0]['count']} objects\n\n| {protocol} | " + " | ".join(labels) + " |"
                    )
                    print("|---" * (len(labels) + 1) + "|")
                cells = []
                for row, of, first in zip(rows, sums, base, strict=True):
                    difference = None if of is first else paired(of, first)
                    text = f"{100 * row['value']:.2f}"
                    if difference is not None:
                        text += " ({:+.2f}, {:+.2f} to {:+.2f})".format(*(100 * part for part in difference))
                    cells.append(text)
                print(f"| {choice} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
