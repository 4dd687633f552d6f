"""Score image towers by captions: find an image's caption among all captions, and a caption's image among all images.

Letters: N images, U distinct captions, P pairs of an image and a caption that it carries, D the shared embedding's
width; Q and T whoever asks, and what it asks for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill import images as image_sources
from fmdistill.backbones.clip import TextHead
from fmdistill.backbones.device import pick_device
from fmdistill.cache import Cache
from fmdistill.evaluate import annotated, text_side
from fmdistill.logs import log
from fmdistill.recipe import Component, Recipe
from fmdistill.registry import UserError
from fmdistill.teachers.compute import full_precision

Judged = tuple[dict[str, float], dict]

RECALLS = (1, 5, 10)
CHUNK = 1024  # rows of the similarity matrix in memory at once


@dataclass(frozen=True)
class Retrieval:
    """How to judge: cosine similarity of images and their captions, recall at 1, 5 and 10, both ways.

    An image has one caption a line of its caption column, and equal captions are one. Each distinct caption asks once
    for an image, and any image that carries it is right; an image asks once among the distinct captions, and any of its
    own is right. An image without a caption is left out and counted. Ties count against the one asked for, so that
    embeddings that are all alike find nothing.

    `images` is a source whose validation images are judged, or null for those of the run's cache, where the teacher is
    judged too, from its cached embeddings.
    """

    images: Component | None = None
    limit: int | None = None  # of the first images
    batch: int = 64
    workers: int = 2
    device: str = "auto"
    dtype: annotated.DType = "fp32"

    def __post_init__(self) -> None:
        """Refuse what would measure nothing."""
        text_side.check_reading(self.batch, self.workers, self.limit)
        if self.images is not None:
            image_sources.check(self.images)


def check_images(protocol: Retrieval, recipe: Recipe) -> None:
    """Raise a UserError if the first image has no caption's column."""
    images = image_sources.build(recipe.images if protocol.images is None else protocol.images)
    encoded = annotated.first_image(images, "retrieval")
    if encoded.caption_column not in encoded.extra:
        raise UserError(
            f"retrieval: image '{encoded.key}' has no caption; it needs KEY.txt beside each image, as img2dataset's "
            f"tars have"
        )


def judge(protocol: Retrieval, recipe: Recipe, models: Mapping[str, nn.Module]) -> Judged:
    """Score students, named apart, and from a cache the teacher, on captioned images.

    Metrics are "STUDENT/image_retrieval@1" (a caption finds its image), "STUDENT/text_retrieval@1" (an image finds its
    caption), at 5 and 10 where there are so many; details {"rows": one per image and subject, "empty": left out}.
    """
    side = text_side.of_run(recipe, models, protocol.images, "retrieval")
    device = pick_device(protocol.device, "device")
    reading = {name: getattr(protocol, name) for name in ("batch", "workers", "limit", "dtype")}
    data = replace(side.data, captioned=True)
    return score(annotated.embed(data, models, device, "retrieval", **reading), side.head.to(device))


def score_teacher(protocol: Retrieval, cache: Cache) -> Judged:
    """Score the teacher alone, from its cached embeddings of the validation images; no picture is decoded."""
    side = text_side.of_cache(cache, None, "retrieval", pixels=False)
    device = pick_device(protocol.device, "device")
    data = replace(side.data, captioned=True)
    found = annotated.embed(data, {}, device, "the teacher, by captions", protocol.batch, 0, protocol.limit)
    return score(found, side.head.to(device))


def score(found: annotated.Embedded, head: TextHead) -> Judged:
    """Return metrics and rows of embeddings that are there already."""
    kept = [place for place, captions in enumerate(found.captions) if captions]
    empty = len(found.captions) - len(kept)
    if not kept:
        raise UserError(
            f"retrieval: none of {empty} images has a caption; it needs KEY.txt beside each image, as img2dataset's "
            f"tars have"
        )
    if empty:
        log.info("retrieval: %d of %d images have no caption and are left out", empty, len(found.captions))
    carried = [[*dict.fromkeys(found.captions[place])] for place in kept]
    captions = list(dict.fromkeys(caption for own in carried for caption in own))
    numbers = {caption: number for number, caption in enumerate(captions)}
    pairs_P2 = torch.tensor([(n, numbers[caption]) for n, own in enumerate(carried) for caption in own])
    with full_precision():
        text_UD = F.normalize(head.encode_text(captions), dim=-1).cpu()
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name, embedding_ND in found.embeddings.items():
        if embedding_ND.shape[1] != text_UD.shape[1]:
            raise UserError(
                f"{name}: gives embeddings of {embedding_ND.shape[1]} numbers, the texts have {text_UD.shape[1]}; "
                f"judge it by the cache that it learned from"
            )
        image_ND = F.normalize(embedding_ND[torch.tensor(kept)], dim=-1)
        image_ranks, text_ranks = ranks(image_ND, text_UD, pairs_P2)
        metrics |= {f"{name}/image_retrieval@{k}": _recall(image_ranks, k) for k in RECALLS if k <= len(kept)}
        metrics |= {f"{name}/text_retrieval@{k}": _recall(text_ranks, k) for k in RECALLS if k <= len(captions)}
        rows += [
            {
                "key": found.keys[place],
                "student": name,
                "captions": carried[n],
                "text_rank": int(text_ranks[n]),
                "image_ranks": [int(image_ranks[numbers[caption]]) for caption in carried[n]],
            }
            for n, place in enumerate(kept)
        ]
    return metrics, {"rows": rows, "empty": empty, "captions": len(captions)}


def ranks(image_ND: Tensor, text_UD: Tensor, pairs_P2: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank, from 1, of each caption's best image (U,) and of each image's best caption (N,).

    `pairs_P2` lists (image, caption) for every caption that an image carries. A rank counts all that are wrong and
    score at least as high as the best right one.
    """
    return _ranks(text_UD, image_ND, pairs_P2.flip(1)), _ranks(image_ND, text_UD, pairs_P2)


def _ranks(query_QD: Tensor, target_TD: Tensor, pairs_P2: Tensor) -> np.ndarray:
    """Return the rank of each query's best target (Q,), of `pairs_P2` (query, target) that are right."""
    found = []
    for start in range(0, len(query_QD), CHUNK):
        cosine_QT = query_QD[start : start + CHUNK] @ target_TD.T
        query_P, target_P = pairs_P2[(pairs_P2[:, 0] >= start) & (pairs_P2[:, 0] < start + CHUNK)].T
        right_QT = torch.zeros_like(cosine_QT, dtype=torch.bool)
        right_QT[query_P - start, target_P] = True
        best_Q = cosine_QT.masked_fill(~right_QT, -torch.inf).amax(1, keepdim=True)
        found.append(1 + (~(cosine_QT < best_Q) & ~right_QT).sum(1))  # so that NaN finds nothing
    return torch.cat(found).numpy()


def _recall(found: np.ndarray, k: int) -> float:
    return float((found <= k).mean())
