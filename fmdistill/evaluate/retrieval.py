"""Score image towers by retrieval: an image's caption among all captions, and a caption's image among all images.

Letters: N images, U distinct captions, P pairs of an image and one of its captions, D the shared embedding's width,
Q queries, T targets.
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
from fmdistill.evaluate import annotated, intervals, results, text_side
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.results import TEACHER, Judged, Metric, Row
from fmdistill.logs import log
from fmdistill.recipe import Component, Recipe
from fmdistill.registry import UserError
from fmdistill.teachers.compute import full_precision

RECALLS = (1, 5, 10)
CHUNK = 1024  # rows of the similarity matrix in memory at once
HELP = "Recall at k: the share of queries, × 100, with a correct target among the k nearest."


@dataclass(frozen=True)
class Retrieval:
    """Recall at 1, 5 and 10 of images and captions by cosine similarity, in both directions.

    Every line of an image's caption column is a caption, and equal captions count once. Each distinct caption is a
    query among the images, and any image with that caption is correct; each image is a query among the distinct
    captions, and any of its own is correct. Images without a caption are left out and counted. Ties count as errors,
    so that identical embeddings retrieve nothing.

    `images` is the source of the validation images; null means those of the run's cache, whose teacher is then scored
    too, from its cached embeddings.
    """

    images: Component | None = None
    limit: int | None = None  # take only the first images
    batch: int = 64
    workers: int = 2
    device: str = "auto"
    dtype: annotated.DType = "fp32"

    metrics: ClassVar[Mapping[str, Metric]] = {
        "image_retrieval": Metric("image retrieval", percent=True, better="higher", end=TEACHER, help=HELP),
        "text_retrieval": Metric("text retrieval", percent=True, better="higher", end=TEACHER, help=HELP),
    }

    def __post_init__(self) -> None:
        """Raise a UserError for settings that measure nothing."""
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
        """Score the students by name, and a cached teacher, on captioned images."""
        side = text_side.of_run(recipe, students, self.images, "retrieval")
        device = pick_device(self.device, "device")
        reading = {name: getattr(self, name) for name in ("batch", "workers", "limit", "dtype")}
        data = replace(side.data, captioned=True)
        return score(annotated.embed(data, students, device, "retrieval", **reading), side.head.to(device))


def score_teacher(protocol: Retrieval, cache: Cache) -> Judged:
    """Score a cached teacher alone, from its embeddings of the validation images, without decoding any image."""
    side = text_side.of_cache(cache, None, "retrieval", pixels=False)
    device = pick_device(protocol.device, "device")
    data = replace(side.data, captioned=True)
    embedded = annotated.embed(data, {}, device, "the teacher, by captions", protocol.batch, 0, protocol.limit)
    return score(embedded, side.head.to(device))


def score(embedded: annotated.Embedded, head: TextHead) -> Judged:
    """Score embeddings: return rows of recall at each k that is at most the number of targets, and details."""
    means, details = collect(embedded, head)
    return means.rows(), {**details, **means.details(keys=False)}


def collect(embedded: annotated.Embedded, head: TextHead) -> tuple[Means, dict[str, Any]]:
    """Score embeddings: return the recall at each k that is at most the number of targets, and details.

    `image_retrieval` has captions as queries, `text_retrieval` images. Details are {"images": one per image and
    subject, "empty": the number of images without a caption, "captions": the number of distinct captions}.
    """
    captioned = [i for i, captions in enumerate(embedded.captions) if captions]
    empty = len(embedded.captions) - len(captioned)
    if not captioned:
        raise UserError(
            f"retrieval: none of {empty} images has a caption; it needs KEY.txt beside each image, as img2dataset's "
            f"tars have"
        )
    if empty:
        log.info("retrieval: %d of %d images have no caption and are left out", empty, len(embedded.captions))
    by_image = [[*dict.fromkeys(embedded.captions[i])] for i in captioned]
    captions = list(dict.fromkeys(caption for image_captions in by_image for caption in image_captions))
    index = {caption: u for u, caption in enumerate(captions)}
    pairs_P2 = torch.tensor(
        [(n, index[caption]) for n, own_captions in enumerate(by_image) for caption in own_captions]
    )
    with full_precision():
        text_UD = F.normalize(head.encode_text(captions), dim=-1).cpu()
    # A caption counts for the first image that has it, so that the captions of an image are resampled together.
    owner = {
        caption: embedded.keys[i] for i, own in reversed([*zip(captioned, by_image, strict=True)]) for caption in own
    }
    keys, owners = [embedded.keys[i] for i in captioned], [owner[caption] for caption in captions]
    means = Means()
    images: list[dict[str, Any]] = []
    for name, embedding_ND in embedded.embeddings.items():
        if embedding_ND.shape[1] != text_UD.shape[1]:
            raise UserError(
                f"{name}: gives embeddings of {embedding_ND.shape[1]} numbers, the texts have {text_UD.shape[1]}; "
                f"evaluate it with the cache that it was trained on"
            )
        image_ND = F.normalize(embedding_ND[torch.tensor(captioned)], dim=-1)
        image_ranks, text_ranks = ranks(image_ND, text_UD, pairs_P2)
        for metric, rank, of, targets in (
            ("image_retrieval", image_ranks, owners, len(captioned)),
            ("text_retrieval", text_ranks, keys, len(captions)),
        ):
            for k in RECALLS:
                if k <= targets:
                    means.add_each(of, name, metric, rank <= k, k=k)
        images += [
            {
                "key": embedded.keys[i],
                "subject": name,
                "captions": by_image[n],
                "text_rank": int(text_ranks[n]),
                "image_ranks": [int(image_ranks[index[caption]]) for caption in by_image[n]],
            }
            for n, i in enumerate(captioned)
        ]
    return means, {"images": images, "empty": empty, "captions": len(captions)}


def mean_recall(means: Means, subject: str, k: int) -> Row | None:
    """Return the row of the mean of image and text retrieval's recall at k; None if one of them has no such k.

    Its interval resamples the images of both at once.
    """
    parts = [means.parts.get((subject, (metric, (("k", k),)))) for metric in ("text_retrieval", "image_retrieval")]
    if parts[0] is None or parts[1] is None:
        return None
    values_N22 = np.array([[part.get(image, (0.0, 0)) for part in parts if part] for image in parts[0]])
    sums_N2, counts_N2 = values_N22[..., 0], values_N22[..., 1]
    value = float((sums_N2.sum(0) / counts_N2.sum(0)).mean())
    row = results.row(subject, "mean_recall", value, len(sums_N2), k=k)
    if len(sums_N2) < 2:
        return row
    with np.errstate(invalid="ignore"):
        values_R = intervals.resampled(sums_N2, counts_N2).mean(1)
    return intervals.with_interval(row, values_R[np.isfinite(values_R)], len(sums_N2))  # some have no caption


def ranks(image_ND: Tensor, text_UD: Tensor, pairs_P2: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank of each caption's best image, int (U,), and of each image's best caption, int (N,).

    `pairs_P2` lists (image, caption) for each caption of each image. A rank is one more than the number of incorrect
    targets that score at least as high as the best correct one.
    """
    return _ranks(text_UD, image_ND, pairs_P2.flip(1)), _ranks(image_ND, text_UD, pairs_P2)


def _ranks(query_QD: Tensor, target_TD: Tensor, pairs_P2: Tensor) -> np.ndarray:
    """Return the rank of each query's best correct target, int (Q,); `pairs_P2` lists the correct (query, target)."""
    ranks = []
    for start in range(0, len(query_QD), CHUNK):
        cosine_QT = query_QD[start : start + CHUNK] @ target_TD.T
        query_P, target_P = pairs_P2[(pairs_P2[:, 0] >= start) & (pairs_P2[:, 0] < start + CHUNK)].T
        correct_QT = torch.zeros_like(cosine_QT, dtype=torch.bool)
        correct_QT[query_P - start, target_P] = True
        best_Q = cosine_QT.masked_fill(~correct_QT, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + (~(cosine_QT < best_Q) & ~correct_QT).sum(1))  # not `>=`, so that NaN counts as an error
    return torch.cat(ranks).numpy()
