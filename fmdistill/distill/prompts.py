"""Draw prompts for the task `refine`: random points, boxes of the teacher's masks, and corrective points."""

# Legend: B images, P prompts an image, N = B P prompts, R rounds of corrections, n the low resolution, S image side.

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache.batch import Place
from fmdistill.cache.dataset import CachedImages

DRAWS = "draws"  # the name of the random numbers in a batch
X, Y, BOX, CHOICE, FIRST_ROUND = range(5)  # what each of an image's random numbers of a prompt is for


@dataclass(frozen=True)
class PromptedImages:
    """A cache's images with the random numbers of their prompts, which depend on nothing but (seed, epoch, key)."""

    images: CachedImages
    prompts: int  # numbers are drawn for so many prompts of an image
    rounds: int
    seed: int

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of images of each shard."""
        return self.images.counts

    def item(self, epoch: int, shard: int, index: int) -> Mapping[str, Any]:
        """Return one image without its outputs, and "draws", float32 (P, 4 + R) in [0, 1)."""
        sample = self.images.item(epoch, shard, index)
        return {**sample, DRAWS: draw(sample["keys"], self.prompts, self.rounds, self.seed, epoch)}

    def read_batch(self, places: Sequence[Place]) -> Mapping[str, Any]:
        """Return the outputs of `places` as they are stored."""
        return self.images.read_batch(places)


def draw(key: str, prompts: int, rounds: int, seed: int = 0, epoch: int = 0) -> Tensor:
    """Return the random numbers of one image's prompts, float32 (P, 4 + R) in [0, 1)."""
    rng = np.random.default_rng([seed, epoch, zlib.crc32(key.encode())])
    return torch.from_numpy(rng.random((prompts, FIRST_ROUND + rounds), np.float32))


@dataclass(frozen=True)
class Prompts:
    """The prompts of B images, image by image: a point each or, if `boxed`, a box, and the corrective points so far."""

    points: Tensor  # (N, 1 + corrections, 2) xy
    labels: Tensor  # (N, 1 + corrections), 1 or 0
    boxes: Tensor  # (N, 4) xyxy
    boxed: Tensor  # (N,) bool

    def plus(self, point_N12: Tensor, label_N1: Tensor) -> "Prompts":
        """Return the prompts with one more point each."""
        points, labels = torch.cat([self.points, point_N12], 1), torch.cat([self.labels, label_N1], 1)
        return replace(self, points=points, labels=labels)


@dataclass(frozen=True)
class Answers:
    """What one embedding of each image answers to its prompts: logits (N, M, n, n), predicted IoU, mask tokens."""

    logits: Tensor
    iou: Tensor
    tokens: Tensor

    @classmethod
    def ask(cls, head: PromptHead, embedding_BCgg: Tensor, request: Prompts) -> "Answers":
        """Decode all prompts of all images together."""
        sparse, dense = head.encode_mixed(request.points, request.labels, request.boxes, request.boxed)
        return cls(*head.decode_tokens(embedding_BCgg, sparse, dense))

    @property
    def best(self) -> Tensor:
        """The masks (N, 1) with the highest predicted IoU."""
        return self.iou.argmax(1, keepdim=True)

    def mask(self, chosen_N1: Tensor) -> Tensor:
        """Return the chosen mask of each prompt, bool (N, n, n)."""
        return taken(self.logits, chosen_N1)[:, 0] > 0


def taken(values_NM: Tensor, chosen_NK: Tensor) -> Tensor:
    """Return the chosen entries (N, K, ...) of `values` (N, M, ...)."""
    rows_N1 = torch.arange(len(values_NM), device=values_NM.device)[:, None]
    return values_NM[rows_N1, chosen_NK]


def points(draws_BPX: Tensor, sizes_B2: Tensor) -> Tensor:
    """Return one point of each prompt (B, P, 2) xy, whole pixels, uniform over each image's (h, w) real pixels."""
    sides_B12 = sizes_B2.flip(1)[:, None].to(draws_BPX)
    return torch.minimum((draws_BPX[..., [X, Y]] * sides_B12).floor(), sides_B12 - 1)


def favour_small(draws_BPX: Tensor, area_BP: Tensor, count: int, power: float) -> Tensor:
    """Return the indices (B, `count`) of prompts drawn without replacement, in proportion to area^-power.

    The drawn ones are those with the largest log(chance) + Gumbel noise, the noise made from the prompts' own draws.
    """
    uniform_BP = draws_BPX[..., CHOICE].clamp(1e-6, 1 - 1e-6)
    gumbel_BP = -(-uniform_BP.log()).log()
    return (gumbel_BP - power * area_BP.clamp(min=1).log()).topk(count, dim=1).indices.sort(1).values


def boxes(mask_Nnn: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Return the boxes (N, 4) xyxy, in pixels, around bool masks, and whether each mask has any cell (N,).

    A cell is `step` pixels wide.
    """
    rows_Nn, columns_Nn = mask_Nnn.any(2), mask_Nnn.any(1)
    side = mask_Nnn.shape[-1]

    def span(line_Nn: Tensor) -> tuple[Tensor, Tensor]:
        ends = line_Nn.to(torch.uint8)
        return ends.argmax(1), side - 1 - ends.flip(1).argmax(1)

    (left, right), (top, bottom) = span(columns_Nn), span(rows_Nn)
    low, high = torch.stack([left, top], 1) * step, (torch.stack([right, bottom], 1) + 1) * step - 1
    return torch.cat([low, high], 1).float(), rows_Nn.any(1)


def corrections(
    wrong_Nnn: Tensor, wanted_Nnn: Tensor, real_Nnn: Tensor, draw_N: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """Return a point (N, 1, 2) xy uniform over each mask's wrong cells, and its label (N, 1), 1 or 0.

    It is the centre of a cell, `step` pixels wide, and of the wanted cells if nothing is wrong, and of the `real` ones
    if nothing is wanted either. All masks are bool.
    """
    pools = wrong_Nnn & real_Nnn, wanted_Nnn & real_Nnn, real_Nnn
    pool_NX = pools[2].flatten(1)
    for other in (pools[1].flatten(1), pools[0].flatten(1)):
        pool_NX = torch.where(other.any(1, keepdim=True), other, pool_NX)
    passed_NX = pool_NX.cumsum(1)
    count_N1 = passed_NX[:, -1:]
    rank_N1 = torch.minimum((draw_N[:, None] * count_N1).floor().long(), count_N1 - 1)
    cell_N1 = torch.searchsorted(passed_NX, rank_N1 + 1)
    side = wrong_Nnn.shape[-1]
    xy_N2 = torch.cat([cell_N1 % side, cell_N1 // side], 1).float() * step + (step - 1) / 2
    return xy_N2[:, None], wanted_Nnn.flatten(1).gather(1, cell_N1).float()
