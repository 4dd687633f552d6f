"""Place clicks on an object: the first by its annotation, the next where a mask is wrong.

Letters: H x W pixels of the image, h x w of the resized image, n x n of the logits.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fmdistill.evaluate.masks import deepest, innermost
from fmdistill.evaluate.segmenters import ImageSegmenter, Size
from fmdistill.evaluate.truth.instances import Instance

FirstClick = Literal["mask_centre", "box_centre", "point"]
NextClick = Literal["largest_error", "random_error"]
LEAST_WRONG = 10  # wrong cells of the logits' grid below which `random_error` places no click


class Click(NamedTuple):
    """A point (x, y) in pixels of the original image, on the object (positive) or beside it."""

    x: float
    y: float
    positive: bool


def first_click(rule: FirstClick, instance: Instance, mask_HW: np.ndarray, scale: tuple[float, float]) -> Click:
    """Return the first click on an instance; `mask_HW` may be resized, `scale` (x, y) takes it to the original image.

    `mask_centre` is the pixel furthest from the mask's edge, `box_centre` the middle of the stated box, `point` the
    stated point. Raises ValueError if the instance states no point.
    """
    if rule == "mask_centre":
        x, y = innermost(mask_HW)
        return Click(x * scale[0], y * scale[1], True)
    if rule == "box_centre":
        x, y, width, height = instance.box
        return Click(x + width / 2, y + height / 2, True)
    if instance.point is None:
        raise ValueError("states no point; set first_click=mask_centre")
    return Click(*instance.point, True)


def largest_error(mask_HW: np.ndarray, truth_HW: np.ndarray, earlier: list[tuple[int, int]]) -> Click | None:
    """Return the centre of the largest error of a mask: the pixel furthest from its edge; None without any error.

    Missing and superfluous pixels are regions apart, and the image's border is an edge. A click is positive if the
    missing region is deeper, else negative; of equal pixels it is the first, row by row. Pixels `earlier` (x, y) are
    not clicked again. Source: RITM's Clicker (Sofiiuk et al., arXiv:2102.06583), as used by EfficientViT-SAM.
    """
    missing_x, missing_y, missing = deepest(truth_HW & ~mask_HW, earlier)
    more_x, more_y, more = deepest(mask_HW & ~truth_HW, earlier)
    if max(missing, more) == 0:
        return None
    return Click(missing_x, missing_y, True) if missing > more else Click(more_x, more_y, False)


def random_error(
    segmenter: ImageSegmenter, logits_nn: Tensor, truth_HW: np.ndarray, rng: np.random.Generator
) -> Click | None:
    """Return a wrong cell of the logits' grid, drawn uniformly; None if fewer than `LEAST_WRONG` are wrong.

    The truth is resized by nearest neighbour to the network's input, and from it bilinearly, without smoothing, to the
    grid, where a cell counts from any share of it. Source: EdgeSAM's evaluation (arXiv:2312.06660).
    """
    size, side, resized = segmenter.head.config["image_size"], logits_nn.shape[-1], segmenter.resized
    shares_nn = _to_grid(nearest(truth_HW, resized), size, side)
    valid_nn = _to_grid(np.ones(resized, bool), size, side)
    mask_nn = (logits_nn.cpu() > 0) * valid_nn
    target_nn = (shares_nn > 0) * valid_nn
    wrong_nn = (mask_nn != target_nn) & ((target_nn == 0) | (target_nn == 1))
    if int(wrong_nn.sum()) < LEAST_WRONG:
        return None
    # The largest of one number a cell: a cell whose logit rounds to the other side of 0 then rarely changes the draw.
    y, x = divmod(int(np.where(wrong_nn.numpy(), rng.random(wrong_nn.shape), -1).argmax()), side)
    pixel, (height, width) = size / side, segmenter.original
    scale_y, scale_x = height / resized[0], width / resized[1]
    return Click(x * pixel * scale_x, y * pixel * scale_y, bool(target_nn[y, x] == 1))


def nearest(mask_HW: np.ndarray, resized: Size) -> np.ndarray:
    """Return a bool mask (h, w), resized by torch's nearest neighbour."""
    return F.interpolate(torch.from_numpy(mask_HW)[None, None].float(), resized, mode="nearest")[0, 0].numpy() > 0


def widened(mask_hw: np.ndarray, original: Size) -> np.ndarray:
    """Return a resized mask at the original size: bilinear, every pixel with any share of it, bool (H, W)."""
    shares = F.interpolate(
        torch.from_numpy(mask_hw)[None, None].float(), original, mode="bilinear", align_corners=False
    )
    return shares[0, 0].numpy() > 0


def _to_grid(mask_hw: np.ndarray, size: int, side: int) -> Tensor:
    padded_SS = torch.zeros(size, size)
    padded_SS[: mask_hw.shape[0], : mask_hw.shape[1]] = torch.from_numpy(mask_hw)
    return F.interpolate(padded_SS[None, None], (side, side), mode="bilinear", align_corners=False)[0, 0]
