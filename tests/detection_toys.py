"""Random annotated images with detections, in COCO's and LVIS's layout, for tests of average precision."""

import numpy as np

from fmdistill.evaluate.masks import to_rle

SIZE = (60, 80)


def blob(generator: np.random.Generator, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Return a random ellipse, bool (H, W), sometimes cut by the image's border."""
    y, x = np.mgrid[: size[0], : size[1]]
    cy, cx = generator.uniform(0, size[0]), generator.uniform(0, size[1])
    ry, rx = generator.uniform(2, size[0] / 2), generator.uniform(2, size[1] / 2)
    mask_HW = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1
    return mask_HW if mask_HW.any() else np.ones(size, bool)


def shifted(mask_HW: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the mask moved by up to five pixels each way."""
    return np.roll(mask_HW, generator.integers(-5, 6, 2), (0, 1))


def annotated(seed: int, images: int = 12, categories: int = 4, crowds: bool = True, lvis: bool = False) -> tuple:
    """Return a data set and detections as COCO's JSON: a mapping, and a list of results with masks."""
    generator = np.random.default_rng(seed)
    groups, size = "rcf", {"height": SIZE[0], "width": SIZE[1]}
    dataset: dict = {"images": [], "annotations": [], "categories": []}
    for category in range(1, categories + 1):
        dataset["categories"].append({"id": category, "name": str(category), "frequency": groups[category % 3]})
    results = []
    for image in generator.permutation(np.arange(1, images + 1)).tolist():
        present = set()
        for _ in range(generator.integers(0, 6)):
            category, mask_HW = int(generator.integers(1, categories + 1)), blob(generator)
            crowd = int(crowds and generator.random() < 0.15)
            present.add(category)
            one = {"id": len(dataset["annotations"]) + 1, "image_id": image, "category_id": category}
            area = float(mask_HW.sum()) * generator.uniform(0.9, 1.1)  # as stated, which may differ from the mask's
            ys, xs = np.nonzero(mask_HW)
            box = [float(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)]
            one |= {"segmentation": to_rle(mask_HW), "area": area, "bbox": box, "iscrowd": crowd}
            dataset["annotations"].append(one)
            for _ in range(generator.integers(0, 4)):
                said = category if generator.random() < 0.8 else int(generator.integers(1, categories + 1))
                score = float(generator.integers(0, 8)) / 8  # many are equal
                result = {"image_id": image, "category_id": said, "score": score}
                results.append(result | {"segmentation": to_rle(shifted(mask_HW, generator))})
        others = sorted(set(range(1, categories + 1)) - present)
        lists = {}
        if lvis:
            lists["neg_category_ids"] = [c for c in others if generator.random() < 0.5]
            lists["not_exhaustive_category_ids"] = [c for c in sorted(present) if generator.random() < 0.4]
        dataset["images"].append({"id": image, "file_name": f"{image:012d}.jpg", **size, **lists})
        for category in others:
            result = {"image_id": image, "category_id": category, "score": float(generator.random())}
            results.append(result | {"segmentation": to_rle(blob(generator))})
    return dataset, results
