"""COCO's forms of a mask against pycocotools and geometry; hostile ones are rejected before pycocotools reads them."""

import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as coco
from scipy import ndimage

from fmdistill.evaluate.masks import deepest, innermost, to_rle
from fmdistill.evaluate.segmentation import decode_rle, decode_segmentation

GOOD = to_rle(np.ones((60, 80), bool))


def runs(mask: np.ndarray) -> list[int]:
    """Return COCO's counts of a mask, counted pixel by pixel down the columns."""
    counts, last = [0], False
    for value in mask.T.reshape(-1).tolist():
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return counts


def box(x: int, y: int, x2: int, y2: int) -> list[int]:
    return [x, y, x2, y, x2, y2, x, y2]


def test_rle_is_read_as_pycocotools_reads_it():
    rng = np.random.default_rng(0)
    masks = [rng.random((h, w)) < p for h, w, p in ((1, 1, 1), (7, 9, 0), (7, 9, 1), (40, 50, 0.5), (300, 200, 0.01))]
    masks.append(np.asarray(PIL.Image.fromarray(rng.random((6, 8)) < 0.5).resize((320, 240))))
    for mask in masks:
        rle = to_rle(mask)
        assert np.array_equal(decode_rle(rle, mask.shape), mask)
        assert np.array_equal(coco.decode({**rle, "counts": rle["counts"].encode()}).astype(bool), mask)


@pytest.mark.parametrize(
    ("rle", "says"),
    [
        ({"size": [60, 81], "counts": GOOD["counts"]}, "size .60, 81. on an image of .60, 80."),
        ({"size": [10**9, 10**9], "counts": GOOD["counts"]}, "on an image of"),
        ({"size": [60, 80], "counts": GOOD["counts"] + "1"}, "does not fill"),
        ({"size": [60, 80], "counts": GOOD["counts"][:-1]}, "does not fill"),
        ({"size": [60, 80], "counts": ""}, "does not fill"),
        ({"size": [60, 80], "counts": "ooooooooooooo0"}, "wrong place"),
        ({"size": [60, 80], "counts": "\x00\u20ac"}, "wrong place"),
        ({"size": [60, 80], "counts": "O" + GOOD["counts"][1:]}, "does not fill"),
        ({"size": [60, 80], "counts": GOOD["counts"] + "o"}, "text is truncated"),
        ({"size": [60, 80], "counts": [0, 4801]}, "does not fill"),
        ({"size": [60, 80], "counts": [4801, -1]}, "does not fill"),
        ({"size": [60, 80], "counts": [10**400]}, "does not fill"),
        ({"size": [60, 80], "counts": [True, 4799]}, "a run of 'True'"),
        ({"size": [60, 80], "counts": [0, 4800.0]}, "a run of '4800.0'"),
        ({"size": [60, 80], "counts": ["4800"]}, "a run of '4800'"),
        ({"size": [60, 80], "counts": {}}, "counts are dict"),
    ],
)
def test_a_hostile_rle_is_an_error(rle, says):
    with pytest.raises(ValueError, match=says):
        decode_rle(rle, (60, 80))


def test_all_forms_of_one_mask_give_one_mask():
    mask = np.zeros((50, 70), bool)
    mask[10:40, 20:60] = True
    mask[2:5, 1:9] = True
    forms = [
        to_rle(mask),
        {"size": [50, 70], "counts": runs(mask)},
        [box(20, 10, 60, 40), box(1, 2, 9, 5)],
        [[float(v) for v in box(20, 10, 60, 40)], box(1, 2, 9, 5), box(25, 15, 30, 30)],  # overlapping: a union
    ]
    for form in forms:
        decoded = decode_segmentation(form, (50, 70))
        assert decoded.dtype == bool and np.array_equal(decoded, mask)


def test_listed_counts_are_read_as_pycocotools_reads_them():
    rng = np.random.default_rng(1)
    for height, width, share in ((1, 1, 1), (7, 9, 0), (7, 9, 1), (40, 50, 0.5), (30, 20, 0.03)):
        mask = rng.random((height, width)) < share
        listed = {"size": [height, width], "counts": runs(mask)}
        assert np.array_equal(decode_rle(listed, (height, width)), mask)
        assert np.array_equal(coco.decode(coco.frPyObjects(listed, height, width)).astype(bool), mask)


@pytest.mark.parametrize("shift", [0, -40, 90])
def test_a_polygon_holds_the_pixels_whose_centres_are_inside(shift):
    """Of an octagon, by its edges' half planes; one partly outside of the image ends at the border."""
    height, width = 120, 160
    angles = np.linspace(0, 2 * np.pi, 9)
    corners = np.stack([80 + shift + 55 * np.cos(angles), 60 + 40 * np.sin(angles)], 1)
    decoded = decode_segmentation([corners[:-1].reshape(-1).tolist()], (height, width))
    y, x = np.mgrid[:height, :width] + 0.5
    distance = np.full((height, width), np.inf)  # to the nearest edge, positive inside
    for (x1, y1), (x2, y2) in zip(corners[:-1], corners[1:], strict=True):
        across = ((x2 - x1) * (y - y1) - (y2 - y1) * (x - x1)) / np.hypot(x2 - x1, y2 - y1)
        distance = np.minimum(distance, across)
    clear = abs(distance) > 0.75
    assert decoded.shape == (height, width) and (distance > 0).sum() > 1000 and clear.mean() > 0.95
    assert np.array_equal(decoded[clear], distance[clear] > 0)


@pytest.mark.parametrize(
    ("polygons", "says"),
    [
        ([], "a list of no polygons"),
        ([[]], "a polygon of 0 numbers"),
        ([[1, 2, 3, 4]], "a polygon of 4 numbers"),  # pycocotools takes four for a box
        ([[1, 2, 3, 4, 5]], "a polygon of 5 numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers"),
        ([1, 2, 3, 4, 5, 6], "a polygon of int"),
        ([[[1, 2], [3, 4], [5, 6], [1, 1], [2, 2], [3, 3]]], "a polygon with"),
        ([[1, 2, 3, 4, 5, "6"]], "a polygon with '6'"),
        ([[1, 2, 3, 4, 5, True]], "a polygon with 'True'"),
        ([[1, 2, 3, 4, 5, None]], "a polygon with 'None'"),
        ([[1, 2, 3, 4, 5, float("nan")]], "far outside"),
        ([[1, 2, 3, 4, 5, float("inf")]], "far outside"),
        ([[1, 2, 3, 4, 5, 1e9]], "far outside"),
        ([[-1e300, 2, 3, 4, 5, 1]], "far outside"),
        ([[1, 2, 3, 4, 5, 10**400]], "too large"),
        ([box(1, 1, 9, 9), [0, 0] + [79, 59, 0, 0] * 1000], "an outline of more than 14000 pixels"),
        ("all", "expected COCO's RLE or polygons"),
        (None, "segmentation is NoneType"),
        (7, "segmentation is int"),
    ],
)
def test_hostile_polygons_are_errors(polygons, says):
    with pytest.raises((ValueError, OverflowError), match=says):
        decode_segmentation(polygons, (60, 80))


def test_the_innermost_pixel_is_found_by_a_search_of_all_pixels():
    rng = np.random.default_rng(2)
    for _ in range(5):
        mask = ndimage.binary_opening(rng.random((25, 30)) < 0.8, iterations=1)
        mask[10:15, 0:9] = True  # at the border, which is an edge
        outside = np.argwhere(~np.pad(mask, 1)) - 1
        inside = np.argwhere(mask)
        distance = np.sqrt(((inside[:, None] - outside[None]) ** 2).sum(-1)).min(1)
        x, y = innermost(mask)
        assert mask[y, x] and distance[(inside == [y, x]).all(1)][0] == pytest.approx(distance.max())


def test_the_deepest_pixel_leaves_out_others_and_states_its_distance():
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = rng.random((9, 12)) < 0.8
        without = [(int(x), int(y)) for x, y in zip(rng.integers(12, size=5), rng.integers(9, size=5), strict=True)]
        outside = [
            (y, x) for y in range(-1, 10) for x in range(-1, 13) if not (0 <= y < 9 and 0 <= x < 12 and mask[y, x])
        ]
        depths = {
            (x, y): 0.0 if (x, y) in without else min(np.hypot(y - v, x - u) for v, u in outside)
            for y in range(9)
            for x in range(12)
            if mask[y, x]
        }
        expected = max(depths, key=depths.__getitem__)
        assert deepest(mask, without) == (*expected, pytest.approx(depths[expected]))
    assert deepest(np.zeros((4, 5), bool)) == (0, 0, 0.0)
    assert deepest(np.eye(1, dtype=bool), [(0, 0)])[2] == 0
