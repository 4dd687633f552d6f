"""Boundary IoU: bands equal to erosion written as a plain loop."""

import numpy as np
import pytest
from detection_toys import blob

from fmdistill.evaluate.boundary import band_width, boundary, boundary_iou


def eroded(mask_HW: np.ndarray) -> np.ndarray:
    """Return the pixels whose eight neighbours and themselves are set; outside the image nothing is."""
    result = np.zeros_like(mask_HW)
    for y in range(1, mask_HW.shape[0] - 1):
        for x in range(1, mask_HW.shape[1] - 1):
            result[y, x] = mask_HW[y - 1 : y + 2, x - 1 : x + 2].all()
    return result


@pytest.mark.parametrize("seed", range(4))
def test_a_boundary_is_what_repeated_erosion_removes(seed):
    mask_HW = blob(np.random.default_rng(seed)) ^ blob(np.random.default_rng(seed + 100))
    for ratio, steps in ((0.02, 2), (0.05, 5), (0.001, 1)):  # of a diagonal of 100
        kept = mask_HW
        for _ in range(steps):
            kept = eroded(kept)
        np.testing.assert_array_equal(boundary(mask_HW, ratio), mask_HW & ~kept)


def test_the_band_is_as_wide_as_boundary_iou_api_makes_it():
    assert [band_width(480, 640), band_width(480, 640, 0.005), band_width(10, 10)] == [16, 4, 1]
    assert band_width(3, 4, 0.5) == 2  # 2.5 is rounded to even


def test_boundary_iou_of_shifted_squares_and_of_nothing():
    a, b, nothing = np.zeros((3, 60, 80), bool)
    a[20:40, 20:40], b[20:40, 21:41] = True, True
    # bands of two pixels: 400 - 16^2 = 144 each; four rows share 19 pixels, 16 rows one at each side
    assert boundary_iou(a, b) == (4 * 19 + 16 * 2) / (2 * 144 - (4 * 19 + 16 * 2))
    assert boundary_iou(a, a) == 1 and boundary_iou(a, nothing) == 0 and boundary_iou(nothing, nothing) == 1
