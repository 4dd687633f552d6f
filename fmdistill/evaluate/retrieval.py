"""Score image towers by captions: find an image's caption among all captions, and a caption's image among all images.

Letters: N images, U distinct captions, P pairs of an image and a caption that it carries, D the shared embedding's
width; Q and T whoever asks, and what it asks for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill import images as image_sources
from fmdistill.backbones.clip import TextHead
from fmdistill.backbones.device import pick_device
from fmdistill.cache import Cache
from fmdistill.evaluate import annotated, results, text_side
from fmdistill.evaluate.results import TEACHER, Judged, Metric, Row
from fmdistill.logs import log
from fmdistill.recipe import Component, Recipe
from fmdistill.registry import UserError
from fmdistill.teachers.compute import full_precision

RECALLS = (1, 5, 10)
CHUNK = 1024  # rows of the similarity matrix in memory at once
HELP = "Recall at k: the share of queries, × 100, whose right answer is among the k nearest."


@dataclass(frozen=True)
class Retrieval:
    """Judge by the cosine similarity of images and their captions, recall at 1, 5 and 10, both ways.

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

    metrics: ClassVar[Mapping[str, Metric]] = {
        "image_retrieval": Metric("image retrieval", percent=True, better="higher", end=TEACHER, help=HELP),
        "text_retrieval": Metric("text retrieval", percent=True, better="higher", end=TEACHER, help=HELP),
    }

    def __post_init__(self) -> None:
        """Refuse what would measure nothing."""
        text_side.check_reading(self.batch, self.workers, self.limit)
        if self.images is not None:
            image_sources.check(self.images)

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a recipe whose run will have no text tower."""
        text_side.check("retrieval", recipe)

    def check_images(self, recipe: Recipe) -> None:
        """Raise a UserError if the first image has no column for captions."""
        images = image_sources.build(recipe.images if self.images is None else self.images)
        encoded = annotated.first_image(images, "retrieval")
        if encoded.caption_column not in encoded.extra:
            raise UserError(
                f"retrieval: image '{encoded.key}' has no caption; it needs KEY.txt beside each image, as "
                f"img2dataset's tars have"
            )

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module]) -> Judged:
        """Score students, named apart, and from a cache the teacher, on captioned images."""
        side = text_side.of_run(recipe, students, self.images, "retrieval")
        device = pick_device(self.device, "device")
        reading = {name: getattr(self, name) for name in ("batch", "workers", "limit", "dtype")}
        data = replace(side.data, captioned=True)
        return score(annotated.embed(data, students, device, "retrieval", **reading), side.head.to(device))


def score_teacher(protocol: Retrieval, cache: Cache) -> Judged:
    """Score the teacher alone, from its cached embeddings of the validation images; no picture is decoded."""
    side = text_side.of_cache(cache, None, "retrieval", pixels=False)
    device = pick_device(protocol.device, "device")
    data = replace(side.data, captioned=True)
    embedded = annotated.embed(data, {}, device, "the teacher, by captions", protocol.batch, 0, protocol.limit)
    return score(embedded, side.head.to(device))


def score(embedded: annotated.Embedded, head: TextHead) -> Judged:
    """Return the rows of embeddings made before: recall at 1, 5 and 10, if there are so many candidates.

    `image_retrieval` is how often a caption's image is among the first k, `text_retrieval` an image's caption. Details
    are {"images": one per image and subject, "empty": how many were left out, "captions": how many differ}.
    """
    kept = [place for place, captions in enumerate(embedded.captions) if captions]
    empty = len(embedded.captions) - len(kept)
    if not kept:
        raise UserError(
            f"retrieval: none of {empty} images has a caption; it needs KEY.txt beside each image, as img2dataset's "
            f"tars have"
        )
    if empty:
        log.info("retrieval: %d of %d images have no caption and are left out", empty, len(embedded.captions))
    carried = [[*dict.fromkeys(embedded.captions[place])] for place in kept]
    captions = list(dict.fromkeys(caption for own in carried for caption in own))
    numbers = {caption: number for number, caption in enumerate(captions)}
    pairs_P2 = torch.tensor([(n, numbers[caption]) for n, own in enumerate(carried) for caption in own])
    with full_precision():
        text_UD = F.normalize(head.encode_text(captions), dim=-1).cpu()
    rows: list[Row] = []
    images: list[dict[str, Any]] = []
    for name, embedding_ND in embedded.embeddings.items():
        if embedding_ND.shape[1] != text_UD.shape[1]:
            raise UserError(
                f"{name}: gives embeddings of {embedding_ND.shape[1]} numbers, the texts have {text_UD.shape[1]}; "
                f"judge it by the cache that it learned from"
            )
        image_ND = F.normalize(embedding_ND[torch.tensor(kept)], dim=-1)
        image_ranks, text_ranks = ranks(image_ND, text_UD, pairs_P2)
        for metric, rank, candidates in (
            ("image_retrieval", image_ranks, len(kept)),
            ("text_retrieval", text_ranks, len(captions)),
        ):
            recalls = {k: float((rank <= k).mean()) for k in RECALLS if k <= candidates}
            rows += [results.row(name, metric, recall, len(rank), k=k) for k, recall in recalls.items()]
        images += [
            {
                "key": embedded.keys[place],
                "subject": name,
                "captions": carried[n],
                "text_rank": int(text_ranks[n]),
                "image_ranks": [int(image_ranks[numbers[caption]]) for caption in carried[n]],
            }
            for n, place in enumerate(kept)
        ]
    return rows, {"images": images, "empty": empty, "captions": len(captions)}


def ranks(image_ND: Tensor, text_UD: Tensor, pairs_P2: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank, from 1, of each caption's best image (U,) and of each image's best caption (N,).

    `pairs_P2` lists (image, caption) for every caption that an image carries. A rank counts all that are wrong and
    score at least as high as the best right one.
    """
    return _ranks(text_UD, image_ND, pairs_P2.flip(1)), _ranks(image_ND, text_UD, pairs_P2)


def _ranks(query_QD: Tensor, target_TD: Tensor, pairs_P2: Tensor) -> np.ndarray:
    """Return the rank of each query's best target (Q,), of `pairs_P2` (query, target) that are right."""
    ranks = []
    for start in range(0, len(query_QD), CHUNK):
        cosine_QT = query_QD[start : start + CHUNK] @ target_TD.T
        query_P, target_P = pairs_P2[(pairs_P2[:, 0] >= start) & (pairs_P2[:, 0] < start + CHUNK)].T
        right_QT = torch.zeros_like(cosine_QT, dtype=torch.bool)
        right_QT[query_P - start, target_P] = True
        best_Q = cosine_QT.masked_fill(~right_QT, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + (~(cosine_QT < best_Q) & ~right_QT).sum(1))  # so that NaN finds nothing
    return torch.cat(ranks).numpy()
