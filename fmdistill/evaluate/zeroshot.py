"""Score image towers by words alone: which class name's text embedding is nearest to an image's embedding.

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

TOP_K = "Top-k: the share of images, × 100, whose class is among the k best answers of a classifier."
RECALL = "Class recall: top-1 class by class, their mean."
ACCURACY = {  # how the rows of `accuracy` read
    "top1": Metric("top-1", percent=True, better="higher", end=TEACHER, help=TOP_K),
    "top5": Metric("top-5", percent=True, better="higher", end=TEACHER, help=TOP_K),
    "mean_per_class_recall": Metric("class recall", percent=True, better="higher", end=TEACHER, help=RECALL),
}
QUARTILE = (
    "Quarters of the images by their similarity to the others in the teacher's embedding: q1 is the least similar, "
    "the rare images, q4 the most."
)


@dataclass(frozen=True)
class Zeroshot:
    """Judge by class names: logits = 100 * e @ W, e the image's unit embedding, W open_clip's own zero-shot classifier.

    `images` is a source whose validation images are judged, or null for those of the run's cache, where the teacher is
    judged too, from its cached embeddings. `classnames` is "imagenet" or a text file with a name a line, label 0
    first; `templates` "openai" (80), "simple" (7), a file, or a list. An image is prepared as for the teacher.

    `quartiles` adds the SRW paper's Table 4: images ranked by the teacher's average cosine similarity to the others of
    random batches of 64 (drawn once, by `seed`; see evaluate/rarity.py), and each quarter's accuracy, q1 the rarest.
    """

    images: Component | None = None
    classnames: str = "imagenet"
    templates: str | list[str] = "openai"
    quartiles: bool = False
    seed: int = 0
    limit: int | None = None  # of the first images
    batch: int = 64
    workers: int = 2
    device: str = "auto"
    dtype: annotated.DType = "fp32"

    metrics: ClassVar[Mapping[str, Metric]] = ACCURACY
    dimensions: ClassVar[Mapping[str, str]] = {"quartile": QUARTILE}

    def __post_init__(self) -> None:
        """Refuse what would measure nothing, and names that are not there, before hours of training."""
        text_side.check_reading(self.batch, self.workers, self.limit)
        if self.images is not None:
            image_sources.check(self.images)
            if self.quartiles:
                raise UserError("quartiles=true: they come from the teacher's cached embeddings; leave `images` out")
        class_names(self.classnames)
        templates(self.templates)

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a recipe whose run will have no text tower."""
        text_side.check("zeroshot", recipe)

    def check_images(self, recipe: Recipe) -> None:
        """Raise a UserError for class folders that do not fit the names, and for a first image without a label."""
        images = image_sources.build(recipe.images if self.images is None else self.images)
        encoded = annotated.first_image(images, "zeroshot")
        names = class_names(self.classnames)
        check_classes(images, self.classnames, len(names))
        _check_label(encoded.key, encoded.label, len(names))

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module]) -> Judged:
        """Score students, named apart, and from a cache the teacher, on labelled images."""
        side = text_side.of_run(recipe, students, self.images, "zeroshot")
        weight_DK = _classifier(self, side)
        device = pick_device(self.device, "device")
        reading = {name: getattr(self, name) for name in ("batch", "workers", "limit", "dtype")}
        return score(self, annotated.embed(side.data, students, device, "zeroshot", **reading), weight_DK)


def score_teacher(protocol: Zeroshot, cache: Cache) -> Judged:
    """Score the teacher alone, from its cached embeddings of the validation images; no picture is decoded."""
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
    """Return the rows of embeddings made before, and details {"images": one per image and subject}.

    `weight_DK` has unit columns.
    """
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
        for place, (key, label) in enumerate(zip(embedded.keys, labels.tolist(), strict=True)):
            image = {"key": key, "subject": name, "label": label, "prediction": int(best_NT[place, 0])}
            images.append(image if quartile is None else {**image, "quartile": int(quartile[place])})
    return rows, {"images": images}


def top(embedding_ND: Tensor, weight_DK: Tensor, name: str) -> np.ndarray:
    """Return the labels of the at most five best classes, best first, int (N, T); `name` says whose in errors."""
    if embedding_ND.shape[1] != len(weight_DK):
        raise UserError(
            f"{name}: gives embeddings of {embedding_ND.shape[1]} numbers, the texts have {len(weight_DK)}; judge it "
            f"by the cache that it learned from"
        )
    count = min(max(TOP), weight_DK.shape[1])
    parts = [100 * F.normalize(part, dim=-1) @ weight_DK for part in embedding_ND.split(CHUNK)]
    return np.concatenate([logits_NK.topk(count, dim=1).indices.numpy() for logits_NK in parts])


def measure(best_NT: np.ndarray, labels_N: np.ndarray, classes: int) -> dict[str, float]:
    """Return {"top1", "top5", "mean_per_class_recall"}; a top-k of more classes than there are is left out."""
    right_NT = best_NT == labels_N[:, None]
    metrics = {f"top{k}": float(right_NT[:, :k].any(1).mean()) for k in TOP if k <= classes}
    counts = np.bincount(labels_N, minlength=classes)
    recalls = np.bincount(labels_N, weights=right_NT[:, 0], minlength=classes)[counts > 0] / counts[counts > 0]
    return {**metrics, "mean_per_class_recall": float(recalls.mean())}


def accuracy(name: str, best_NT: np.ndarray, labels_N: np.ndarray, classes: int, **part: Any) -> list[Row]:
    """Return the rows of what `measure` gives for the subject `name`; of a part of the images only the top-k."""
    measured = measure(best_NT, labels_N, classes)
    wanted = {metric: value for metric, value in measured.items() if not part or metric.startswith("top")}
    return [results.row(name, metric, value, len(labels_N), **part) for metric, value in wanted.items()]


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
        raise UserError(f"image '{key}': label {label}, but there are {classes} class names, for labels from 0")
