"""Folders of images with annotations and detector boxes in COCO's layout: scenes, and photographs drawn by hand."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from fmdistill.evaluate.masks import to_rle
from fmdistill.mini.photos import photograph
from fmdistill.mini.scenes import Scenes, draw

ELLIPSES = {  # x, y, horizontal and vertical radius of what the photographs show
    "chelsea": {"eye": [(172, 115, 34, 30), (321, 136, 23, 27)]},
    "coffee": {"saucer": [(278, 225, 202, 160)], "coffee": [(286, 142, 83, 50)], "spoon": [(367, 283, 39, 42)]},
    "coins": {
        "coin": [
            (43, 55, 22, 22), (154, 52, 23, 23), (334, 43, 29, 29), (267, 118, 25, 25), (346, 186, 32, 32),
            (212, 193, 23, 23), (46, 260, 28, 28),
        ]
    },
}  # fmt: skip
CROWD = [(45, 124, 20, 20), (102, 126, 19, 19), (152, 127, 19, 19)]  # coins
CLASSES = ["eye", "saucer", "coffee", "spoon", "coin"]


def scenes(folder: Path, count: int = 3, classes: int = 2, size: int = 128) -> tuple[str, str]:
    """Write scenes with their exact masks as RLE; return the paths of annotations and boxes."""
    dataset = _empty([str(number) for number in range(classes)])
    for index in range(count):
        scene = draw(Scenes(size=size), "validation", index)
        height, width = scene.labels.shape
        image = _image(dataset, folder, f"{10 * (count - index):012d}.png", scene.pixels)  # ids fall
        for value in range(1, scene.labels.max() + 1):
            mask_HW = scene.labels == value
            _annotate(dataset, image, 1 + value % classes, to_rle(mask_HW), mask_HW)
    return _write(folder, dataset)


def photographs(folder: Path) -> tuple[str, str]:
    """Write photographs with regions as polygons, RLE in text and in lists, and a crowd; return the paths."""
    dataset = _empty(CLASSES)
    for name, regions in ELLIPSES.items():
        pixels = photograph(name)
        image = _image(dataset, folder, f"{name}.jpg", pixels)
        for kind, ellipses in regions.items():
            for number, ellipse in enumerate(ellipses):
                polygon = _polygon(ellipse)
                mask_HW = _drawn([polygon], pixels.shape[:2])
                forms = [[polygon], to_rle(mask_HW), _listed(mask_HW)]
                _annotate(dataset, image, 1 + CLASSES.index(kind), forms[number % 3], mask_HW)
        if name == "coins":
            mask_HW = _drawn([_polygon(ellipse) for ellipse in CROWD], pixels.shape[:2])
            _annotate(dataset, image, 1 + CLASSES.index("coin"), _listed(mask_HW), mask_HW, crowd=1)
    return _write(folder, dataset)


def _empty(names: list[str]) -> dict:
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    return {"images": [], "annotations": [], "categories": categories}


def _image(dataset: dict, folder: Path, name: str, pixels: np.ndarray) -> dict:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / "images" / name)
    number = int(Path(name).stem) if name[0].isdigit() else 100 - len(dataset["images"])
    record = {"id": number, "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]}
    dataset["images"].append(record)
    return record


def _annotate(dataset: dict, image: dict, category: int, segmentation, mask_HW: np.ndarray, crowd: int = 0) -> None:
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    box = [int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
    one = {"id": len(dataset["annotations"]) + 1, "image_id": image["id"], "category_id": category, "iscrowd": crowd}
    dataset["annotations"].append(one | {"segmentation": segmentation, "bbox": box, "area": int(mask_HW.sum())})


def _polygon(ellipse: tuple[int, int, int, int]) -> list[float]:
    x, y, across, down = ellipse
    turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([x + across * np.cos(turns), y + down * np.sin(turns)], 1).ravel().round(2).tolist()


def _drawn(polygons: list[list[float]], size: tuple[int, ...]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, size[0], size[1]))).astype(bool)


def _listed(mask_HW: np.ndarray) -> dict:
    """Return RLE with listed counts."""
    flat = np.concatenate([[0], mask_HW.ravel(order="F").astype(int), [1 - mask_HW[-1, -1]]])
    changes = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], changes]))
    return {"size": list(mask_HW.shape), "counts": [int(count) for count in counts]}


def _write(folder: Path, dataset: dict) -> tuple[str, str]:
    """Write the annotations, and boxes as a detector would give them: moved, some doubled, some of nothing."""
    generator, boxes = np.random.default_rng(0), []
    numbers = {image["id"]: image for image in dataset["images"]}
    for one in dataset["annotations"]:
        for _ in range(generator.integers(1, 3)):
            moved = np.array(one["bbox"]) + generator.normal(0, 2, 4)
            box = [float(v) for v in np.maximum(moved, [-5, -5, 1, 1])]
            known = {name: one[name] for name in ("image_id", "category_id")}
            boxes.append({**known, "bbox": box, "score": float(generator.random())})
    for number, image in numbers.items():
        box = [float(v) for v in (5, 7, image["width"] / 3, image["height"] / 4)]
        category = int(generator.integers(1, len(dataset["categories"]) + 1))
        boxes.append({"image_id": number, "category_id": category, "bbox": box, "score": float(generator.random())})
    generator.shuffle(boxes)
    paths = folder / "annotations.json", folder / "boxes.json"
    for path, content in zip(paths, (dataset, boxes), strict=True):
        path.write_text(json.dumps(content))
    return str(paths[0]), str(paths[1])
