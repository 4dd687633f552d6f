"""How unlike the others an image is to the teacher, and the four quarters by it.

Letters: N images, D the embedding's width.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BATCH = 64  # images that one is compared with, itself included: the SRW paper's Table 4


def similarity(embedding_ND: Tensor, seed: int = 0, batch: int = BATCH) -> np.ndarray:
    """Return each image's average cosine similarity to the others of its batch, float64 (N,).

    The images are shuffled by `seed` and cut into round(N / batch) batches (at least one) whose sizes differ by at
    most one, so that no image is left over; an image's own similarity to itself does not count.
    """
    unit_ND = F.normalize(embedding_ND.double(), dim=-1)
    order = np.random.default_rng(seed).permutation(len(unit_ND))
    found = np.zeros(len(unit_ND))
    for members in np.array_split(order, max(1, round(len(order) / batch))):
        unit_BD = unit_ND[torch.from_numpy(members)]
        cosine_BB = unit_BD @ unit_BD.T
        others = cosine_BB.sum(1) - cosine_BB.diagonal()
        found[members] = (others / max(1, len(members) - 1)).numpy()
    return found


def quartiles(similarity_N: np.ndarray) -> np.ndarray:
    """Return each image's quartile 1 to 4, int (N,): 1 holds the quarter least like the others, the rarest.

    Images are ranked by similarity, ties by their place; the quarters' sizes differ by at most one.
    """
    found = np.zeros(len(similarity_N), dtype=int)
    for number, members in enumerate(np.array_split(np.argsort(similarity_N, kind="stable"), 4), start=1):
        found[members] = number
    return found
