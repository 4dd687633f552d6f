"""Score image towers by zero-shot classification: the class whose text embedding is nearest to the image's embedding.

Letters: N images, K classes, D the shared embedding's width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill import images as image_sources
from fmdistill.backbones.device import pick_device
from fmdistill.cache import Cache
from fmdistill.cache.batch import NO_LABEL
from fmdistill.evaluate import accuracy, annotated, rarity, text_side
from fmdistill.evaluate.accuracy import ACCURACY, TOP
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.results import TEACHER, Judged, Metric
from fmdistill.evaluate.text_classifier import check_classes, class_names, classifier, templates
from fmdistill.recipe import Component, Recipe
from fmdistill.registry import UserError

CHUNK = 4096  # images whose logits are in memory at once

PROBABILITIES = {
    "confidence": Metric(
        "confidence",
        percent=True,
        help="Confidence: the mean probability, × 100, of the best class; above top-1 it promises too much.",
    ),
    "log_loss": Metric("log loss", better="lower", help="Log loss: the mean negative log of the label's probability."),
}
QUARTILE = (
    "Quarters of the images by the similarity of their teacher embeddings to the others': q1 holds the least similar, "
    "rare images, q4 the most similar."
)


@dataclass(frozen=True)
class Zeroshot:
    """Zero-shot accuracy: logits = 100 * e @ W, e the image's unit embedding, W open_clip's zero-shot classifier.

    `images` is the source of the validation images; null means those of the run's cache, whose teacher is then scored
    too, from its cached embeddings. `classnames` is "imagenet", a text file with one name per line, or a list, in order
    of label; `templates` is "openai" (80), "simple" (7), a file, or a list. Images are prepared as for the teacher.

    `quartiles` adds the SRW paper's Table 4: the accuracy by quarter of the images, ranked by the mean cosine
    similarity of their teacher embedding to the others of a random batch of 64 (drawn once by `seed`; see
    evaluate/rarity.py); q1 is the rarest quarter. `scales` adds for each logit scale the mean probability of the best
    class and the log loss; top-k does not depend on the scale.
    """

    images: Component | None = None
    classnames: str | list[str] = "imagenet"
    templates: str | list[str] = "openai"
    quartiles: bool = False
    seed: int = 0
    scales: tuple[float, ...] = ()
    limit: int | None = None  # take only the first images
    batch: int = 64
    workers: int = 2
    device: str = "auto"
    dtype: annotated.DType = "fp32"

    metrics: ClassVar[Mapping[str, Metric]] = {**ACCURACY, **PROBABILITIES}
    dimensions: ClassVar[Mapping[str, str]] = {"quartile": QUARTILE}

    def __post_init__(self) -> None:
        """Raise a UserError for settings that measure nothing, and for missing files, before hours of training."""
        text_side.check_reading(self.batch, self.workers, self.limit)
        if wrong := [scale for scale in self.scales if not 0 < scale < math.inf]:
            raise UserError(f"scales={list(self.scales)}: {wrong[0]} is no factor of a cosine; give numbers above 0")
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
    """Score embeddings by a classifier with unit columns; return rows, and details with one of "images" per subject."""
    classes = weight_DK.shape[1]
    labels = label_array(embedded, classes)
    quartile = None
    if protocol.quartiles:
        quartile = rarity.quartiles(rarity.similarity(embedded.embeddings[TEACHER], protocol.seed))
    best = {name: top(embedding_ND, weight_DK, name) for name, embedding_ND in embedded.embeddings.items()}
    means = Means()
    images: list[dict[str, Any]] = []
    for name, best_NT in best.items():
        accuracy.add_top(means, name, embedded.keys, best_NT, labels, classes)
        for number in range(1, 5) if quartile is not None else ():
            members = np.flatnonzero(quartile == number)
            keys = [embedded.keys[i] for i in members]
            accuracy.add_top(means, name, keys, best_NT[members], labels[members], classes, quartile=f"q{number}")
        for scale in protocol.scales:
            _add_probabilities(means, embedded, name, weight_DK, labels, scale)
        for i, (key, label) in enumerate(zip(embedded.keys, labels.tolist(), strict=True)):
            image = {"key": key, "subject": name, "label": label, "prediction": int(best_NT[i, 0])}
            images.append(image if quartile is None else {**image, "quartile": int(quartile[i])})
    rows = accuracy.by_subject([*means.rows(), *accuracy.class_rows(best, labels, classes)])
    return rows, {"images": images, **means.details(keys=False)}


def _add_probabilities(
    means: Means, embedded: annotated.Embedded, name: str, weight_DK: Tensor, labels_N: np.ndarray, scale: float
) -> None:
    """Add the probability of each image's best class, and the log loss, if logits are `scale` times the cosine."""
    parts = embedded.embeddings[name].split(CHUNK)
    log_N2 = []
    for part_BD, label_B in zip(parts, torch.from_numpy(labels_N).split(CHUNK), strict=True):
        log_BK = (scale * F.normalize(part_BD, dim=-1) @ weight_DK).double().log_softmax(1)
        log_N2.append(torch.stack([log_BK.amax(1), log_BK.gather(1, label_B[:, None])[:, 0]], dim=1))
    best_N, label_N = torch.cat(log_N2).T
    means.add_each(embedded.keys, name, "confidence", best_N.exp().tolist(), scale=scale)
    means.add_each(embedded.keys, name, "log_loss", (-label_N).tolist(), scale=scale)


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


def label_array(embedded: annotated.Embedded, classes: int) -> np.ndarray:
    """Return the labels, int (N,). Raises UserError for an image without a label, or with one above the classes."""
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
