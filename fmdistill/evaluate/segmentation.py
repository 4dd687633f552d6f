"""Decode a mask in any of COCO's forms, checking everything first: the file may be damaged or hostile.

Letters: H x W pixels of the image.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Size = tuple[int, int]
LONGEST = 100  # outline of an annotation's polygons, in half perimeters of its image: bounds pycocotools' memory


def decode_segmentation(segmentation: Any, original: Size) -> np.ndarray:
    """Decode COCO's compressed RLE, RLE with listed counts, or list of polygons into a bool mask (H, W).

    Raises ValueError, TypeError or LookupError if it is none of these or does not fit `original`, (H, W).
    """
    if isinstance(segmentation, list):
        return decode_polygons(segmentation, original)
    if not isinstance(segmentation, Mapping):
        raise ValueError(f"its segmentation is {type(segmentation).__name__}, expected COCO's RLE or polygons")
    return decode_rle(segmentation, original)


def decode_rle(rle: Mapping[str, Any], original: Size) -> np.ndarray:
    """Decode COCO's RLE, whose runs alternate between background and object down the columns, into a bool mask (H, W).

    Raises ValueError if the runs do not fill `original` exactly. Not decoded by pycocotools, which reads past the end
    of a truncated text and trusts the size that the RLE states.
    """
    counts, size = rle["counts"], rle["size"]
    if list(size) != list(original):
        raise ValueError(f"a mask of size {str(size)[:40]} on an image of {list(original)}")
    if isinstance(counts, str):
        runs = _decompressed(counts)
    elif isinstance(counts, list):
        runs = counts
        if wrong := next((run for run in runs if type(run) is not int), None):
            raise ValueError(f"a run of {str(wrong)[:40]!r} in an RLE, expected a number of pixels")
    else:
        raise ValueError(f"counts are {type(counts).__name__}, expected a list or a compressed RLE's text")
    total = original[0] * original[1]
    if min(runs, default=0) < 0 or sum(runs) != total:
        raise ValueError(f"an RLE that does not fill the image's {total} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(original[1], original[0]).T


def decode_polygons(polygons: list[Any], original: Size) -> np.ndarray:
    """Draw COCO's polygons, [x1, y1, x2, y2, ...] each, by pycocotools; return the union as a bool mask (H, W).

    Raises ValueError if a coordinate is not a finite number or lies further from the image than the image's size.
    """
    from pycocotools import mask as coco

    if not polygons:
        raise ValueError("its segmentation is a list of no polygons")
    checked = [_polygon(points, original) for points in polygons]
    longest = LONGEST * sum(original)
    if sum(map(_outline, checked)) > longest:
        raise ValueError(f"polygons with an outline of more than {longest} pixels")
    encoded: Any = coco.frPyObjects(checked, *original)  # type: ignore[call-overload]
    return coco.decode(coco.merge(encoded)).astype(bool)


def _polygon(points: Any, original: Size) -> list[float]:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        shown = f"{len(points)} numbers" if isinstance(points, list) else type(points).__name__
        raise ValueError(f"a polygon of {shown}, expected x and y of three points or more")
    if wrong := [value for value in points if isinstance(value, bool) or not isinstance(value, int | float)]:
        raise ValueError(f"a polygon with {str(wrong[0])[:40]!r}, expected numbers")
    numbers = [float(value) for value in points]
    for values, side in ((numbers[::2], original[1]), (numbers[1::2], original[0])):
        if not all(math.isfinite(value) and -side <= value <= 2 * side for value in values):
            raise ValueError(f"a polygon with a point far outside the image of {list(original)}")
    return numbers


def _outline(numbers: list[float]) -> float:
    """Return the length of a polygon's outline in pixels, each edge counted as the larger of its width and height."""
    steps_N2 = np.diff(np.array([*numbers, *numbers[:2]]).reshape(-1, 2), axis=0)
    return float(np.abs(steps_N2).max(1).sum())


def _decompressed(counts: str) -> list[int]:
    """Decode COCO's compressed RLE to the lengths of its runs, in pixels.

    Source: maskApi.c rleFrString: 5 bits a character, lowest first; from the fourth run on, the difference to the run
    two before.
    """
    runs: list[int] = []
    value = bits = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or bits > 30:
            raise ValueError(f"character {character!r} at the wrong place in an RLE")
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:
            value -= (code & 16) << (bits - 4)  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = bits = 0
    if bits:
        raise ValueError("an RLE whose text is truncated: it does not fill the image")
    return runs
