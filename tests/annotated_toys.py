"""Scenes with their objects annotated in COCO's, LVIS's and SA-1B's formats and as label maps, in one folder."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from fmdistill.evaluate.masks import innermost, to_rle
from fmdistill.mini.scenes import Scenes, decode_labels


def listed(mask: np.ndarray) -> dict[str, Any]:
    """Return COCO's RLE with listed counts, by a plain loop down the columns."""
    counts, last = [0], False
    for value in mask.T.ravel().tolist():
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def write(folder: Path, images: int = 4, size: int = 96, objects: tuple[int, int] = (3, 5)) -> dict[str, Any]:
    """Write images/KEY.png, KEY.json beside it, labels/KEY.png and coco.json; return the contents of coco.json.

    The first object of each image is annotated as a crowd, with listed counts; the others have compressed RLE.
    """
    scenes = Scenes(train=1, validation=images, size=size, seed=3, objects=objects, area=(0.01, 0.25))
    coco: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "a"}, {"id": 7, "name": "b"}],
    }
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(images):
        scene = scenes.encode("validation", index)
        stem = f"{index:012d}"
        (folder / f"images/{stem}.png").write_bytes(scene.data)
        (folder / f"labels/{stem}.png").write_bytes(scene.extra["labels.png"])
        labels = decode_labels(scene.extra["labels.png"])
        height, width = labels.shape
        coco["images"].append({"id": index + 10, "file_name": f"{stem}.jpg", "height": height, "width": width})
        own = []
        for value in [v for v in np.unique(labels).tolist() if v > 0]:
            mask = labels == value
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1]
            crowd = value == 1
            own.append(
                {
                    "id": len(coco["annotations"]) + len(own) + 1,
                    "image_id": index + 10,
                    "category_id": 1 if value % 2 else 7,
                    "segmentation": listed(mask) if crowd else to_rle(mask),
                    "bbox": [float(v) for v in box],
                    "area": float(mask.sum()),
                    "iscrowd": int(crowd),
                    "point_coords": [[float(v) + 0.25 for v in innermost(mask)]],
                }
            )
        coco["annotations"] += own
        sa1b = {"image": {"image_id": index}, "annotations": own}
        (folder / f"images/{stem}.json").write_text(json.dumps(sa1b))
    (folder / "coco.json").write_text(json.dumps(coco))
    return coco


def pixels(folder: Path, record: dict[str, Any]) -> np.ndarray:
    """Return the pixels of one of coco.json's images, uint8 (H, W, 3)."""
    path = folder / "images" / Path(record["file_name"]).with_suffix(".png")
    return np.asarray(PIL.Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))


def source(folder: Path) -> dict[str, Any]:
    """Return the images component of the folder."""
    return {"name": "folder", "root": str(folder / "images"), "validation": 0}
