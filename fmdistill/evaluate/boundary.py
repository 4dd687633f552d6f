"""Reduce masks to bands along their outlines, and compare these: boundary IoU.

Source: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021.
Letters: H x W pixels of the image.
"""

import math

import numpy as np
from scipy import ndimage

RATIO = 0.02  # of the image's diagonal: the band's width for COCO and LVIS; Cityscapes has 0.005


def band_width(height: int, width: int, ratio: float = RATIO) -> int:
    """Return the band's width in pixels: `ratio` of the image's diagonal, at least 1."""
    return max(1, round(ratio * math.hypot(height, width)))


def boundary(mask_HW: np.ndarray, ratio: float = RATIO) -> np.ndarray:
    """Return the mask's pixels that erosion by 3 x 3 removes in `band_width` steps, bool (H, W).

    Pixels outside the image count as background, so a mask that the image's border cuts has a boundary there.
    """
    band_HW = np.asarray(mask_HW, dtype=bool).copy()
    boxes = ndimage.find_objects(band_HW.astype(np.uint8))
    if not boxes:
        return band_HW
    inside = band_HW[boxes[0]]
    # n steps of 3 x 3 are one step of a square with side 2 n + 1
    side = 2 * band_width(band_HW.shape[0], band_HW.shape[1], ratio) + 1
    eroded = ndimage.minimum_filter(inside.astype(np.uint8), side, mode="constant", cval=0)
    band_HW[boxes[0]] = inside & (eroded == 0)
    return band_HW


def boundary_iou(a_HW: np.ndarray, b_HW: np.ndarray, ratio: float = RATIO) -> float:
    """Return the IoU of the boundaries of two masks of one image; 1 if both are empty."""
    a_HW, b_HW = boundary(a_HW, ratio), boundary(b_HW, ratio)
    either = int((a_HW | b_HW).sum())
    return int((a_HW & b_HW).sum()) / either if either else 1.0
