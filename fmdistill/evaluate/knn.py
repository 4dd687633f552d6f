"""Score students of any family by k-nearest-neighbour classification, which needs labels but no text.

Letters: N images of the bank, Q query images, K classes of the bank, D a feature's width, k neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill import images as image_sources
from fmdistill import stop
from fmdistill.backbones.device import pick_device
from fmdistill.cache import Cache, open_cache
from fmdistill.cache.batch import NO_LABEL
from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate import annotated, text_side
from fmdistill.evaluate.annotated import Annotated, Embedded
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.results import TEACHER, Judged, Metric
from fmdistill.images import Encoded, Images
from fmdistill.recipe import Component, Recipe
from fmdistill.registry import UserError, suggest
from fmdistill.teachers.compute import full_precision

MAJORITY = "majority class"
ELEMENTS = 2**26  # similarities in memory at once
HELP = (
    "k-NN top-1: the share of validation images, × 100, whose class has the largest vote among the k training images "
    "with the nearest features; the floor always predicts the most frequent class."
)


@dataclass(frozen=True)
class Knn:
    """Top-1 of labelled validation images by their nearest training images, as in DINO (Caron et al., ICCV 2021).

    The features of the training split are the bank, those of the validation split the queries. Each of a query's k
    neighbours by cosine similarity s votes for its class with exp(s / `temperature`). Of equal similarities the image
    that comes first in the bank is nearer; of equal votes the smaller label wins. A k larger than the bank is left out.

    `output` is the output of student and teacher to use: a vector, or a map, which is averaged over its valid tokens.
    `images` is a source with both splits; null means those of the run's cache, whose teacher is then scored too, from
    its cached outputs (with the codec's rounding in the training split). Images are prepared as for the teacher. `bank`
    and `limit` take only the first training and validation images.
    """

    ks: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    output: str = "embedding"
    images: Component | None = None
    bank: int | None = None
    limit: int | None = None
    batch: int = 64
    workers: int = 2
    device: str = "auto"
    dtype: annotated.DType = "fp32"

    metrics: ClassVar[Mapping[str, Metric]] = {
        "top1": Metric("k-NN top-1", percent=True, better="higher", end=TEACHER, help=HELP)
    }
    splits: ClassVar[tuple[str, ...]] = ("train", "validation")

    def __post_init__(self) -> None:
        """Raise a UserError for settings that measure nothing."""
        text_side.check_reading(self.batch, self.workers, self.limit)
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise UserError(f"ks={list(self.ks)}: needs different numbers of neighbours, 1 or more")
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature}: needs to be above 0")
        if self.bank is not None and self.bank < 1:
            raise UserError(f"bank={self.bank}: needs at least 1, or null for all")
        if self.images is not None:
            image_sources.check(self.images)

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a recipe without a cache."""
        if recipe.cache is None:
            raise UserError("knn: prepares images as for the cached teacher, and this recipe has no cache")

    def check_images(self, recipe: Recipe) -> None:
        """Raise a UserError if a split has no image, or its first image no label."""
        source = image_sources.build(recipe.images if self.images is None else self.images)
        for split in self.splits:
            _check_label(annotated.first_image(source, "knn", split))

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module]) -> Judged:
        """Score the students by name, the cached teacher and the floor; details have an entry per image and subject."""
        cache = open_cache(recipe)
        if self.images is None and self.output not in cache.shapes:
            raise UserError(f"output={self.output}: not in {cache.root}.{suggest(self.output, cache.shapes)}")
        source = cache.images if self.images is None else image_sources.build(self.images)
        bank, queries = (self._embed(cache, source, students, split) for split in self.splits)
        ks = [k for k in self.ks if k <= len(bank.keys)]
        if not ks:
            raise UserError(f"ks={list(self.ks)}: the bank has {len(bank.keys)} images; give a smaller number")
        bank_N, label_Q = _labels(bank), _labels(queries)
        means = Means()
        images: list[dict[str, Any]] = []
        for name, feature_ND in bank.embeddings.items():
            feature_QD = queries.embeddings[name].to(pick_device(self.device, "device"))
            predicted_Qk = predict(feature_ND, bank_N, feature_QD, ks, self.temperature)
            _add(means, name, queries.keys, predicted_Qk, label_Q, ks)
            for key, label, predicted in zip(queries.keys, label_Q.tolist(), predicted_Qk.tolist(), strict=True):
                by_k = {str(k): predicted_label for k, predicted_label in zip(ks, predicted, strict=True)}
                images.append({"key": key, "subject": name, "label": label, "predictions": by_k})
        class_K, count_K = np.unique(bank_N, return_counts=True)
        majority_Qk = np.full((len(label_Q), len(ks)), class_K[count_K.argmax()])
        _add(means, MAJORITY, queries.keys, majority_Qk, label_Q, ks)
        return means.rows(), {"images": images, "bank": len(bank.keys), **means.details(keys=False)}

    def _embed(self, cache: Cache, source: Images, students: Mapping[str, nn.Module], split: str) -> Embedded:
        """Return the features of one split from every student and, if cached, from the teacher."""
        cached = CachedImages(cache, split) if self.images is None else None
        data = Annotated(source, cache.preprocess, cached, split=split, output=self.output, pooled=True)
        limit = self.bank if split == "train" else self.limit
        device = pick_device(self.device, "device")
        title = f"knn, {'bank' if split == 'train' else 'queries'}"
        embedded = annotated.embed(data, students, device, title, self.batch, self.workers, limit, self.dtype)
        for name, feature_ND in embedded.embeddings.items():
            if not (finite_N := feature_ND.isfinite().all(1)).all():
                key = embedded.keys[int((~finite_N).nonzero()[0])]
                raise UserError(f"knn: {name} gives image '{key}' an {self.output} that is not finite")
        return embedded


def predict(
    bank_ND: Tensor, label_N: np.ndarray, query_QD: Tensor, ks: Sequence[int], temperature: float
) -> np.ndarray:
    """Return the label predicted for each query by its k nearest images of the bank, int (Q, len(ks)); see `Knn`.

    Computed on the device of `query_QD`, with votes in float64.
    """
    device = query_QD.device
    class_K, class_N = np.unique(label_N, return_inverse=True)
    class_N = torch.from_numpy(class_N).to(device)
    unit_ND = F.normalize(bank_ND.to(device), dim=1)
    predicted = []
    for chunk_QD in stop.between(query_QD.split(max(1, ELEMENTS // len(bank_ND)))):
        with full_precision():
            cosine_QN = F.normalize(chunk_QD, dim=1) @ unit_ND.T
        nearest_Qk = nearest(cosine_QN, max(ks))
        vote_Qk = (cosine_QN.gather(1, nearest_Qk).double() / temperature).exp()
        class_Qk = class_N[nearest_Qk]
        best = []
        for k in ks:
            votes_QK = torch.zeros(len(chunk_QD), len(class_K), dtype=torch.float64, device=device)
            best.append(votes_QK.scatter_add_(1, class_Qk[:, :k], vote_Qk[:, :k]).argmax(1))
        predicted.append(torch.stack(best, dim=1).cpu())
    return class_K[torch.cat(predicted).numpy()]


def nearest(cosine_QN: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest similarities, descending, int (Q, k); equal ones in order of index."""
    top = cosine_QN.topk(k, dim=1)
    # topk does not define which of equal values it returns: rows with a tie across the k-th place are sorted whole.
    index_Qk = top.indices.sort(dim=1).values
    order_Qk = cosine_QN.gather(1, index_Qk).argsort(dim=1, descending=True, stable=True)
    index_Qk = index_Qk.gather(1, order_Qk)
    tied_Q = (cosine_QN >= top.values[:, -1:]).sum(1) > k
    if tied_Q.any():
        index_Qk[tied_Q] = cosine_QN[tied_Q].argsort(dim=1, descending=True, stable=True)[:, :k]
    return index_Qk


def _add(
    means: Means, name: str, keys: Sequence[str], predicted_Qk: np.ndarray, label_Q: np.ndarray, ks: Sequence[int]
) -> None:
    for k, predicted_Q in zip(ks, predicted_Qk.T, strict=True):
        means.add_each(keys, name, "top1", predicted_Q == label_Q, k=k)


def _labels(embedded: Embedded) -> np.ndarray:
    for key, label in zip(embedded.keys, embedded.labels, strict=True):
        if label == NO_LABEL:
            raise _no_label(key)
    return np.array(embedded.labels, dtype=np.int64)


def _check_label(encoded: Encoded) -> None:
    if encoded.label is None:
        raise _no_label(encoded.key)


def _no_label(key: str) -> UserError:
    return UserError(
        f"knn: image '{key}' has no label; use a source with labels, such as image_classes (class folders), or a tar "
        f"with KEY.cls beside each image"
    )
