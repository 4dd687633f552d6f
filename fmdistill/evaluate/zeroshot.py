"""Score image towers by zero-shot classification: the class whose text embedding is nearest to the image's embedding.

Letters: N images, K classes, D the shared embedding's width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill import images as image_sources
from fmdistill.backbones.device import pick_device
from fmdistill.cache import Cache
from fmdistill.cache.batch import NO_LABEL
from fmdistill.evaluate import annotated, rarity, results, text_side
from fmdistill.evaluate.results import TEACHER, Judged, Metric, Row
from fmdistill.evaluate.text_classifier import check_classes, class_names, classifier, templates
from fmdistill.recipe import Component, Recipe
from fmdistill.registry import UserError

TOP = (1, 5)
CHUNK = 4096  # images whose logits are in memory at once

TOP_K = "Top-k: the share of images, × 100, whose class is among a classifier's k best."
RECALL = "Class recall: top-1 class by class, their mean."
ACCURACY = {  # the metrics of the rows of `accuracy`
    "top1": Metric("top-1", percent=True, better="higher", end=TEACHER, help=TOP_K),
    "top5": Metric("top-5", percent=True, better="higher", end=TEACHER, help=TOP_K),
    "mean_per_class_recall": Metric("class recall", percent=True, better="higher", end=TEACHER, help=RECALL),
}
QUARTILE = (
    "Quarters of the images by the similarity of their teacher embeddings to the others': q1 holds the least similar, "
    "rare images, q4 the most similar."
)


@dataclass(frozen=True)
class Zeroshot:
    """Zero-shot accuracy: logits = 100 * e @ W, e the image's unit embedding, W open_clip's zero-shot classifier.

    `images` is the source of the validation images; null means those of the run's cache, whose teacher is then scored
    too, from its cached embeddings. `classnames` is "imagenet" or a text file with one name per line, in order of
    label; `templates` is "openai" (80), "simple" (7), a file, or a list. Images are prepared as for the teacher.

    `quartiles` adds the SRW paper's Table 4: the accuracy by quarter of the images, ranked by the mean cosine
    similarity of their teacher embedding to the others of a random batch of 64 (drawn once by `seed`; see
    evaluate/rarity.py); q1 is the rarest quarter.
    """

    images: Component | None = None
    classnames: str = "imagenet"
    templates: str | list[str] = "openai"
    quartiles: bool = False
    seed: int = 0
    limit: int | None = None  # take only the first images
    batch: int = 64
    workers: int = 2
    device: str = "auto"
    dtype: annotated.DType = "fp32"

    metrics: ClassVar[Mapping[str, Metric]] = ACCURACY
    dimensions: ClassVar[Mapping[str, str]] = {"quartile": QUARTILE}

    def __post_init__(self) -> None:
        """Raise a UserError for settings that measure nothing, and for missing files, before hours of training."""
        text_side.check_reading(self.batch, self.workers, self.limit)
        if self.images is not None:
            image_sources.check(self.images)
            if self.quartiles:
                raise UserError("quartiles=true: they come from the teacher's cached embeddings; remove `images`")
        class_names(self.classnames)
        templates(self.templates)

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a recipe whose run will have no text tower."""
        text_side.check("zeroshot", recipe)

    def check_images(self, recipe: Recipe) -> None:
        """Raise a UserError for class folders that do not match the names, or a first image without a label."""
        images = image_sources.build(recipe.images if self.images is None else self.images)
        encoded = annotated.first_image(images, "zeroshot")
        names = class_names(self.classnames)
        check_classes(images, self.classnames, len(names))
        _check_label(encoded.key, encoded.label, len(names))

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module]) -> Judged:
        """Score the students by name, and a cached teacher, on labelled images."""
        side = text_side.of_run(recipe, students, self.images, "zeroshot")
        weight_DK = _classifier(self, side)
        device = pick_device(self.device, "device")
        reading = {name: getattr(self, name) for name in ("batch", "workers", "limit", "dtype")}
        return score(self, annotated.embed(side.data, students, device, "zeroshot", **reading), weight_DK)


def score_teacher(protocol: Zeroshot, cache: Cache) -> Judged:
    """Score a cached teacher alone, from its embeddings of the validation images, without decoding any image."""
    side = text_side.of_cache(cache, None, "zeroshot", pixels=False)
    weight_DK = _classifier(protocol, side)
    device = pick_device(protocol.device, "device")
    embedded = annotated.embed(side.data, {}, device, "the teacher, zero-shot", protocol.batch, 0, protocol.limit)
    return score(protocol, embedded, weight_DK)


def _classifier(protocol: Zeroshot, side: text_side.TextSide) -> Tensor:
    names = class_names(protocol.classnames)
    check_classes(side.data.images, protocol.classnames, len(names))
    device = pick_device(protocol.device, "device")
    return classifier(side.head, names, templates(protocol.templates), device, side.folder)


def score(protocol: Zeroshot, embedded: annotated.Embedded, weight_DK: Tensor) -> Judged:
    """Score embeddings by a classifier with unit columns; return rows, and details {"images": one per subject}."""
    classes = weight_DK.shape[1]
    labels = _labels(embedded, classes)
    quartile = None
    if protocol.quartiles:
        quartile = rarity.quartiles(rarity.similarity(embedded.embeddings[TEACHER], protocol.seed))
    rows: list[Row] = []
    images: list[dict[str, Any]] = []
    for name, embedding_ND in embedded.embeddings.items():
        best_NT = top(embedding_ND, weight_DK, name)
        rows += accuracy(name, best_NT, labels, classes)
        for number in range(1, 5) if quartile is not None else ():
            members_N = quartile == number
            if members_N.any():
                rows += accuracy(name, best_NT[members_N], labels[members_N], classes, quartile=f"q{number}")
        for i, (key, label) in enumerate(zip(embedded.keys, labels.tolist(), strict=True)):
            image = {"key": key, "subject": name, "label": label, "prediction": int(best_NT[i, 0])}
            images.append(image if quartile is None else {**image, "quartile": int(quartile[i])})
    return rows, {"images": images}


def top(embedding_ND: Tensor, weight_DK: Tensor, name: str) -> np.ndarray:
    """Return the labels of each image's five best classes, or all if fewer, best first, int (N, T).

    Raises UserError, with the subject's `name`, if image and text embeddings differ in width.
    """
    if embedding_ND.shape[1] != len(weight_DK):
        raise UserError(
            f"{name}: gives embeddings of {embedding_ND.shape[1]} numbers, the texts have {len(weight_DK)}; evaluate "
            f"it with the cache that it was trained on"
        )
    count = min(max(TOP), weight_DK.shape[1])
    parts = [100 * F.normalize(part, dim=-1) @ weight_DK for part in embedding_ND.split(CHUNK)]
    return np.concatenate([logits_NK.topk(count, dim=1).indices.numpy() for logits_NK in parts])


def measure(best_NT: np.ndarray, labels_N: np.ndarray, classes: int) -> dict[str, float]:
    """Return {"top1", "top5", "mean_per_class_recall"}, as shares; top5 is left out if there are fewer classes."""
    right_NT = best_NT == labels_N[:, None]
    metrics = {f"top{k}": float(right_NT[:, :k].any(1).mean()) for k in TOP if k <= classes}
    counts = np.bincount(labels_N, minlength=classes)
    recalls = np.bincount(labels_N, weights=right_NT[:, 0], minlength=classes)[counts > 0] / counts[counts > 0]
    return {**metrics, "mean_per_class_recall": float(recalls.mean())}


def accuracy(name: str, best_NT: np.ndarray, labels_N: np.ndarray, classes: int, **part: Any) -> list[Row]:
    """Return the rows of `measure` for the subject `name`; for a part of the images only the top-k."""
    metrics = measure(best_NT, labels_N, classes)
    chosen = {metric: value for metric, value in metrics.items() if not part or metric.startswith("top")}
    return [results.row(name, metric, value, len(labels_N), **part) for metric, value in chosen.items()]


def _labels(embedded: annotated.Embedded, classes: int) -> np.ndarray:
    for key, label in zip(embedded.keys, embedded.labels, strict=True):
        _check_label(key, label, classes)
    return np.array(embedded.labels, dtype=np.int64)


def _check_label(key: str, label: int | None, classes: int) -> None:
    if label is None or label == NO_LABEL:
        raise UserError(
            f"image '{key}': has no label; zeroshot needs class folders (source image_classes), or a tar with "
            f"KEY.cls beside each image"
        )
    if label >= classes:
        raise UserError(
            f"image '{key}': has label {label}, but the {classes} class names are for labels 0 to {classes - 1}; add "
            f"the missing names to the file of classnames"
        )
