"""Sort points into buckets: by the area of the teacher's mask, and by the point's distance to that mask's edge.

Letters: P points with one mask each, H x W pixels, n offsets a side of a window.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

Buckets = tuple[tuple[float, str], ...]  # upper bound (not included) and name, ascending

# Shares of the image that an object or a mask covers; then distances as shares of the image's longer side.
SHARES: Buckets = ((0.003, "below_0.3%"), (0.01, "0.3-1%"), (0.03, "1-3%"), (0.1, "3-10%"), (math.inf, "above_10%"))
AREAS: Buckets = tuple((top, f"area_{name}") for top, name in SHARES)
EDGES: Buckets = ((0.01, "edge_below_1%"), (0.04, "edge_1-4%"), (math.inf, "edge_above_4%"))


def record_buckets(
    pieces: Iterable[Tensor], xy_P2: Tensor, by_size: bool, by_edge: bool, buckets: dict[str, list[np.ndarray]]
) -> Iterator[Tensor]:
    """Yield the masks unchanged, bool (n, H, W) pieces, and append each bucket's members among them to `buckets`.

    Members are bool (n,) by the bucket's name; a point is in one bucket by size and in one by edge. `xy_P2` are the
    points in pixels of the masks.
    """
    done = 0
    for piece in pieces:
        members: dict[str, np.ndarray] = {}
        if by_size:
            members |= split(area(piece), AREAS)
        if by_edge:
            members |= split(edge_distance(piece, xy_P2[done : done + len(piece)]), EDGES)
        for name, members_n in members.items():
            buckets[name].append(members_n)
        done += len(piece)
        yield piece


def area(masks_PHW: Tensor) -> np.ndarray:
    """Return the share of the pixels that each mask covers, 0 to 1, float64 (P,)."""
    rows_PH = masks_PHW.sum(2, dtype=torch.int32)  # in two steps, several times as fast on a CPU
    return rows_PH.sum(1).cpu().numpy() / masks_PHW[0].numel()


def edge_distance(masks_PHW: Tensor, xy_P2: Tensor) -> np.ndarray:
    """Return the Euclidean distance of each point to its mask's edge as a share of the longer side, float64 (P,).

    Measured from the point's pixel to the nearest pixel across the edge, whether the point lies inside its mask or
    outside, so at least 1 pixel. The image's border is no edge, since no model has to find it. Infinity if no edge is
    within the last finite bound of `EDGES`, as for a mask that is empty or the whole image.
    """
    height, width = masks_PHW.shape[1:]
    longer, device = max(height, width), masks_PHW.device
    radius = math.ceil(EDGES[-2][0] * longer)
    offset_n = torch.arange(-radius, radius + 1, device=device)
    distance_nn = (offset_n[:, None].square() + offset_n.square()).double().sqrt()
    distance_nn[distance_nn > radius] = math.inf  # beyond, nearer pixels may lie outside the window
    x_P, y_P = xy_P2.to(device).T
    # Clamped offsets repeat pixels of the border, which the window also holds at their own, shorter distance.
    rows_Pn = (y_P[:, None] + offset_n).clamp(0, height - 1)
    columns_Pn = (x_P[:, None] + offset_n).clamp(0, width - 1)
    point_P = torch.arange(len(masks_PHW), device=device)
    window_Pnn = masks_PHW[point_P[:, None, None], rows_Pn[:, :, None], columns_Pn[:, None, :]]
    across_Pnn = window_Pnn != masks_PHW[point_P, y_P, x_P][:, None, None]
    nearest_P = torch.where(across_Pnn, distance_nn, math.inf).flatten(1).amin(1)
    return nearest_P.cpu().numpy() / longer


def split(value_P: np.ndarray, buckets: Buckets) -> dict[str, np.ndarray]:
    """Return each bucket's members, bool (P,) by the bucket's name; the last bucket takes the rest, infinity too."""
    number_P = np.searchsorted([top for top, _ in buckets[:-1]], value_P, side="right")
    return {name: number_P == number for number, (_, name) in enumerate(buckets)}
