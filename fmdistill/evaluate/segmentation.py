"""Read a mask in any of COCO's forms, from a file that nobody vouches for.

Letters: H x W pixels of the image.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Size = tuple[int, int]
LONGEST = 100  # outline of an annotation's polygons, in half perimeters of its image: pycocotools' memory follows it


def decode_segmentation(segmentation: Any, original: Size) -> np.ndarray:
    """Return the bool (H, W) mask of COCO's compressed RLE, RLE with listed counts, or list of polygons.

    ValueError, TypeError or LookupError if it is none of them or does not fit `original`.
    """
    if isinstance(segmentation, list):
        return decode_polygons(segmentation, original)
    if not isinstance(segmentation, Mapping):
        raise ValueError(f"its segmentation is {type(segmentation).__name__}, expected COCO's RLE or polygons")
    return decode_rle(segmentation, original)


def decode_rle(rle: Mapping[str, Any], original: Size) -> np.ndarray:
    """Return the bool (H, W) mask of COCO's RLE; ValueError if it does not fill `original` exactly.

    pycocotools reads past the end of a cut text and trusts the size that it states, so a stranger's RLE is decoded
    here: its runs are those of background and object in turns, down the columns.
    """
    counts, size = rle["counts"], rle["size"]
    if list(size) != list(original):
        raise ValueError(f"a mask of size {str(size)[:40]} on an image of {list(original)}")
    if isinstance(counts, str):
        runs = _decompressed(counts)
    elif isinstance(counts, list):
        runs = counts
        if odd := next((run for run in runs if type(run) is not int), None):
            raise ValueError(f"a run of {str(odd)[:40]!r} in an RLE, expected a number of pixels")
    else:
        raise ValueError(f"counts are {type(counts).__name__}, expected a list or a compressed RLE's text")
    total = original[0] * original[1]
    if min(runs, default=0) < 0 or sum(runs) != total:
        raise ValueError(f"an RLE that does not fill the image's {total} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(original[1], original[0]).T


def decode_polygons(polygons: list[Any], original: Size) -> np.ndarray:
    """Return the bool (H, W) mask of all pixels in any of COCO's polygons, [x1, y1, x2, y2, ...] each, by pycocotools.

    ValueError for points that are no finite numbers or lie further from the image than its own size.
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
    if odd := [value for value in points if isinstance(value, bool) or not isinstance(value, int | float)]:
        raise ValueError(f"a polygon with {str(odd[0])[:40]!r}, expected numbers")
    numbers = [float(value) for value in points]
    for values, side in ((numbers[::2], original[1]), (numbers[1::2], original[0])):
        if not all(math.isfinite(value) and -side <= value <= 2 * side for value in values):
            raise ValueError(f"a polygon with a point far outside the image of {list(original)}")
    return numbers


def _outline(numbers: list[float]) -> float:
    """Return the length of a polygon's outline, as the larger of each edge's width and height."""
    steps_N2 = np.diff(np.array([*numbers, *numbers[:2]]).reshape(-1, 2), axis=0)
    return float(np.abs(steps_N2).max(1).sum())


def _decompressed(counts: str) -> list[int]:
    """Return the runs of COCO's compressed RLE.

    Source: maskApi.c rleFrString: 5 bits a character, lowest first, runs from the fourth on less the one two before.
    """
    runs: list[int] = []
    value = bits = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or bits > 30:
            raise ValueError(f"character {character!r} at the wrong place of an RLE")
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:
            value -= (code & 16) << (bits - 4)  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = bits = 0
    if bits:
        raise ValueError("an RLE whose text is cut: it does not fill the image")
    return runs
