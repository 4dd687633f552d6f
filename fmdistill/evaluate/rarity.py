"""Rank images by rarity: how unlike the other images the teacher's embedding of each is.

Letters: N images, D the embedding's width.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BATCH = 64  # images in a batch, within which each is compared with the others: the SRW paper's Table 4


def similarity(embedding_ND: Tensor, seed: int = 0, batch: int = BATCH) -> np.ndarray:
    """Return each image's mean cosine similarity to the other images of its batch, float64 (N,).

    The images are shuffled by `seed` and divided into round(N / batch) batches (at least one) whose sizes differ by at
    most one.
    """
    unit_ND = F.normalize(embedding_ND.double(), dim=-1)
    order = np.random.default_rng(seed).permutation(len(unit_ND))
    mean_N = np.zeros(len(unit_ND))
    for members in np.array_split(order, max(1, round(len(order) / batch))):
        unit_BD = unit_ND[torch.from_numpy(members)]
        cosine_BB = unit_BD @ unit_BD.T
        others = cosine_BB.sum(1) - cosine_BB.diagonal()
        mean_N[members] = (others / max(1, len(members) - 1)).numpy()
    return mean_N


def quartiles(similarity_N: np.ndarray) -> np.ndarray:
    """Return each image's quartile, int 1 to 4 (N,): 1 is the quarter with the lowest similarity, the rarest images.

    Images of equal similarity are ranked by their index; the quarters' sizes differ by at most one.
    """
    quartile_N = np.zeros(len(similarity_N), dtype=int)
    for number, members in enumerate(np.array_split(np.argsort(similarity_N, kind="stable"), 4), start=1):
        quartile_N[members] = number
    return quartile_N
