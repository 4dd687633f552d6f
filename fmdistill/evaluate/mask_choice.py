"""Choose among a prompt's masks, and turn their logits into binary masks at a resolution.

Letters: P prompts, M masks of a prompt, X masks of any number of prompts, H x W original pixels, h x w of the logits.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fmdistill.backbones.promptable import PromptHead
from fmdistill.evaluate.segmenters import Size

Resolution = Literal["original", "low"]


def choose(logits_PMhw: Tensor, predicted_PM: Tensor, select: str) -> Tensor:
    """Select the mask with the highest predicted IoU if `select` is best_predicted, else return all (P, M, h, w)."""
    if select != "best_predicted":
        return logits_PMhw
    best_P = predicted_PM.argmax(1)
    return logits_PMhw[torch.arange(len(best_P), device=best_P.device), best_P].unsqueeze(1)


def binary(
    head: PromptHead, logits_Xhw: Tensor, original: Size, resized: Size, resolution: Resolution
) -> Iterator[Tensor]:
    """Yield the masks, logits > 0, as bool pieces (n, H, W), in order; at `low`, the logits' grid without padding."""
    if resolution == "low":
        rows, columns = valid_cells(head, resized)
        yield (logits_Xhw[:, :rows, :columns] > 0).contiguous()
        return
    # Small pieces stay in a CPU's cache.
    pixels = 2**28 if logits_Xhw.is_cuda else 2**20
    step = max(1, pixels // max(original[0] * original[1], head.config["image_size"] ** 2))
    for piece in logits_Xhw.unsqueeze(1).split(step):
        yield (head.upsample(piece, resized, original) > 0).squeeze(1)


def valid_cells(head: PromptHead, resized: Size) -> Size:
    """Return how many rows and columns of the logits hold any real pixel, as for tokens."""
    scale = 4 * head.config["image_embedding_size"] / head.config["image_size"]
    return math.ceil(resized[0] * scale), math.ceil(resized[1] * scale)
