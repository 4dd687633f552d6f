"""Compare and store binary masks: bit-packed IoU on a CPU, plain tensors on a GPU, COCO RLE for files.

Letters: P masks, H x W pixels, N words of 64 pixels.
"""

from collections.abc import Collection

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

Bits = np.ndarray | Tensor  # uint64 (P, N) on a CPU, bool (P, H*W) on a GPU


def pack(masks_PHW: Tensor) -> Bits:
    """Pack bool masks into the form that `iou` compares; unused bits of the last word are 0."""
    flat = masks_PHW.flatten(1)
    if flat.is_cuda:
        return flat
    packed = np.packbits(flat.numpy(), axis=1)
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)


def join(parts: list[Bits]) -> Bits:
    """Concatenate packed masks of equal size."""
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    return np.concatenate(parts)


def iou(a: Bits, b: Bits) -> np.ndarray:
    """Return the IoU of mask i of `a` with mask i of `b`, float64 (P,); empty against empty is 1."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        both, either = (a & b).sum(1).cpu().numpy(), (a | b).sum(1).cpu().numpy()
    else:
        both = np.bitwise_count(a & b).sum(1, dtype=np.int64)
        either = np.bitwise_count(a | b).sum(1, dtype=np.int64)
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def innermost(mask_HW: np.ndarray) -> tuple[int, int]:
    """Return (x, y) of the pixel of a non-empty bool mask that is furthest from its edge; the border is an edge."""
    x, y, _ = deepest(mask_HW)
    return x, y


def deepest(mask_HW: np.ndarray, without: Collection[tuple[int, int]] = ()) -> tuple[int, int, float]:
    """Return (x, y) of the pixel of a bool mask that is furthest from its edge, and its distance in pixels.

    The image's border is an edge; of equal pixels the first, row by row. Pixels (x, y) of `without` do not count. The
    distance is 0 if no pixel is left.
    """
    boxes = ndimage.find_objects(mask_HW.astype(np.uint8))
    if not boxes:
        return 0, 0, 0.0
    top, left = boxes[0][0].start, boxes[0][1].start
    inside = np.asarray(ndimage.distance_transform_edt(np.pad(mask_HW[boxes[0]], 1)))[1:-1, 1:-1]
    for x, y in without:
        if 0 <= y - top < inside.shape[0] and 0 <= x - left < inside.shape[1]:
            inside[y - top, x - left] = 0
    y, x = np.unravel_index(np.argmax(inside), inside.shape)
    return int(x) + left, int(y) + top, float(inside[y, x])


def to_rle(mask_HW: np.ndarray) -> dict:
    """Encode a binary mask as COCO's compressed RLE, {"size": [H, W], "counts": str}, ready for JSON."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(n) for n in rle["size"]], "counts": text}
