"""What is annotated on one image: its instances, as their file states them, and what was left out and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmdistill.evaluate.segmentation import Size, decode_segmentation
from fmdistill.evaluate.segmenters import SegmentedImage

MALFORMED = (ValueError, TypeError, LookupError, OverflowError, RecursionError)  # what malformed JSON or RLE raises
Box = tuple[float, float, float, float]


class Skip(NamedTuple):
    """Something that was left out: the reason in a few words, which are counted, and the place with its problem."""

    reason: str
    place: str


@dataclass(frozen=True)
class Instance:
    """One annotated object, its box (x, y, width, height) in pixels and its area in pixels as stated."""

    id: int
    segmentation: Any  # COCO's RLE, or its list of polygons
    box: Box
    area: float
    category: int | None = None
    crowd: bool = False
    point: tuple[float, float] | None = None  # (x, y): the point that SA-1B states, or that the mask was made from

    def mask(self, original: Size) -> np.ndarray:
        """Return the mask, bool (H, W). Raises one of MALFORMED if it is damaged or of another size."""
        return decode_segmentation(self.segmentation, original)


@dataclass(frozen=True)
class ImageTruth:
    """The instances of one image; the image's id and the sets of categories are those of COCO's and LVIS's files."""

    instances: tuple[Instance, ...]
    skipped: tuple[Skip, ...] = ()
    image_id: int | None = None
    negative: frozenset[int] = frozenset()  # LVIS: categories that are known to be absent
    not_exhaustive: frozenset[int] = frozenset()  # LVIS: categories with objects that were not annotated


class Category(NamedTuple):
    """A category's name and, in LVIS, its frequency: "r", "c" or "f"."""

    name: str
    frequency: str | None = None


@dataclass(frozen=True)
class JoinedTruth:
    """A truth joined with images: `images` are the names of those that it annotates, in the order of the images.

    `ids` are the ids of these images in COCO's and LVIS's files, by name.
    """

    images: Sequence[str]
    of: Callable[[SegmentedImage], ImageTruth]
    skipped: tuple[Skip, ...] = ()
    categories: Mapping[int, Category] = field(default_factory=dict)
    stated: tuple[int, int] | None = None  # the numbers of images and annotations in a file for all images
    ids: Mapping[str, int] = field(default_factory=dict)


def instance(annotation: Any, number: int, category: int | None = None) -> Instance:
    """Return an annotation of COCO, LVIS or SA-1B as an instance. Raises one of MALFORMED if a part is wrong."""
    if not isinstance(annotation, Mapping):
        raise ValueError(f"is {type(annotation).__name__}, expected a mapping")
    x, y, width, height = (float(value) for value in annotation["bbox"])
    area = float(annotation["area"])
    if not np.isfinite([x, y, width, height, area]).all() or width < 0 or height < 0:
        raise ValueError(f"its box {[x, y, width, height]} or its area {area} is not a size")
    point = None
    if (points := annotation.get("point_coords")) is not None:
        point = (float(points[0][0]), float(points[0][1]))
        if not np.isfinite(point).all():
            raise ValueError(f"its point is {point}")
    crowd = bool(annotation.get("iscrowd", 0))
    return Instance(number, annotation["segmentation"], (x, y, width, height), area, category, crowd, point)


def of_mask(number: int, mask_HW: np.ndarray, rle: Any, point: tuple[float, float] | None = None) -> Instance:
    """Return a mask that is not empty as an instance; its box and area are those of its pixels."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    box = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    return Instance(number, rle, tuple(map(float, box)), float(mask_HW.sum()), point=point)  # type: ignore[arg-type]


def problem(error: BaseException) -> str:
    """Return an error as one short line."""
    text = " ".join(str(error).split())[:160]
    return f"has no {text}" if isinstance(error, KeyError) else text or type(error).__name__


def stem(name: str) -> str:
    """Return a file's name without folders and suffix, by which images and annotations are joined."""
    return Path(name).stem
