"""Score classifiers by accuracy, overall, by how frequent a class is in training, and by how rare an image is.

Letters: N images, K classes, T best classes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fmdistill import stop
from fmdistill.backbones.class_preprocess import ClassPreprocess
from fmdistill.backbones.classifiers import CLASSIFIERS
from fmdistill.backbones.device import pick_device
from fmdistill.cache.batch import Batch, to_device
from fmdistill.distill import provider as providers
from fmdistill.distill.data import every
from fmdistill.distill.loader import batches
from fmdistill.distill.provider import Provider
from fmdistill.distill.student import STUDENTS
from fmdistill.evaluate import accuracy, rarity
from fmdistill.evaluate.accuracy import ACCURACY, TOP
from fmdistill.evaluate.annotated import first_image
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.results import TEACHER, Judged, Metric
from fmdistill.evaluate.zeroshot import QUARTILE
from fmdistill.images import build as build_images
from fmdistill.logs import progress
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

FREQUENCY = "Many, medium and few: classes grouped by the number of their training images."


@dataclass(frozen=True)
class Top1:
    """Top-1 and top-5 accuracy of the logits against the labels, on the recipe's validation images.

    `quartiles` adds the SRW paper's Table 4: the accuracy by quarter of the images, ranked by the mean cosine
    similarity of the teacher's `feature` to the others of a random batch of 64 (drawn once by `seed`; see
    evaluate/rarity.py); q1 is the rarest quarter. `frequency` adds the accuracy on classes with more than `many`
    training images, with fewer than `few`, and on the rest (Liu et al., "Large-Scale Long-Tailed Recognition in an Open
    World", CVPR 2019: 100 and 20). `classes` is the required number of classes, so that a published table is only set
    beside results on its own data; None accepts any.
    """

    classes: int | None = None
    quartiles: bool = False
    feature: str = "logits"
    seed: int = 0
    frequency: bool = False
    many: int = 100
    few: int = 20
    batch: int = 256
    workers: int = 0
    device: str = "auto"

    metrics: ClassVar[Mapping[str, Metric]] = ACCURACY
    dimensions: ClassVar[Mapping[str, str]] = {"quartile": QUARTILE, "frequency": FREQUENCY}

    def __post_init__(self) -> None:
        """Raise a UserError for settings that measure nothing."""
        if self.batch < 1 or self.workers < 0:
            raise UserError(f"batch={self.batch}, workers={self.workers}: expected at least 1, and at least 0")
        if not 0 < self.few <= self.many:
            raise UserError(f"few={self.few}, many={self.many}: expected 0 < few <= many training images")

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a student that is no classifier."""
        name = recipe.student.get("name")
        if name in STUDENTS and name not in CLASSIFIERS:
            raise UserError(f"top1: needs a classifier, and student.name={name} is none; name another protocol")

    def check_images(self, recipe: Recipe) -> None:
        """Raise a UserError if the first validation image has no label."""
        encoded = first_image(build_images(recipe.images), "top1")
        if encoded.label is None:
            raise UserError(f"top1: image '{encoded.key}' has no label; use a source with labels")

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module]) -> Judged:
        """Score the students by name, and the teacher if the recipe has one."""
        size = next(iter(students.values())).image_size
        statistics = str(recipe.task.get("statistics", "cifar100"))
        provider = providers.build(recipe, ClassPreprocess.of(size, statistics))  # type: ignore[arg-type]
        labels_N, keys, logits, feature_ND = _read(self, provider, recipe, students)
        classes = next(iter(logits.values())).shape[1]
        if self.classes not in (None, classes):
            raise UserError(
                f"top1: classes={self.classes}, but {recipe.out} has {classes} classes; use a protocol for {classes}"
            )
        if labels_N.min() < 0 or labels_N.max() >= classes:
            raise UserError(
                f"top1: the images' labels are {labels_N.min()} to {labels_N.max()}, but the student has {classes} "
                f"classes; use images whose labels are 0 to {classes - 1}"
            )
        parts: list[tuple[dict[str, str], np.ndarray]] = [({}, np.ones(len(labels_N), dtype=bool))]
        if self.quartiles:
            if feature_ND is None:
                raise UserError(
                    "quartiles=true: images are ranked by the teacher's feature, and this recipe has no teacher"
                )
            quartile_N = rarity.quartiles(rarity.similarity(feature_ND, self.seed))
            parts += [({"quartile": f"q{number}"}, quartile_N == number) for number in range(1, 5)]
        if self.frequency:
            parts += _by_frequency(self, provider.labels(), labels_N, classes)
        return _scored(logits, labels_N, keys, parts)


def _scored(
    logits: Mapping[str, Tensor],
    labels_N: np.ndarray,
    keys: list[str],
    parts: list[tuple[dict[str, str], np.ndarray]],
) -> Judged:
    """Return rows for every subject's logits (N, K) and each part of the images; details have an entry per image."""
    means = Means()
    images: list[dict[str, Any]] = []
    classes = {name: logits_NK.shape[1] for name, logits_NK in logits.items()}
    best = {
        name: logits_NK.topk(min(max(TOP), classes[name]), dim=1).indices.numpy() for name, logits_NK in logits.items()
    }
    rows = []
    for name, best_NT in best.items():
        for part, members_N in parts:
            members = np.flatnonzero(members_N)
            part_keys = [keys[i] for i in members]
            accuracy.add_top(means, name, part_keys, best_NT[members], labels_N[members], classes[name], **part)
        rows += accuracy.class_rows({name: best_NT}, labels_N, classes[name])
        for key, label, predicted in zip(keys, labels_N.tolist(), best_NT[:, 0].tolist(), strict=True):
            images.append({"key": key, "subject": name, "label": label, "prediction": predicted})
    return accuracy.by_subject([*means.rows(), *rows]), {"images": images, **means.details(keys=False)}


def _read(
    protocol: Top1, provider: Provider, recipe: Recipe, models: Mapping[str, nn.Module]
) -> tuple[np.ndarray, list[str], dict[str, Tensor], Tensor | None]:
    """Run the models; return labels, keys, every subject's logits (N, K), and the teacher's feature (N, D) or None."""
    device = pick_device(protocol.device, "device")
    models = {name: model.to(device).eval() for name, model in models.items()}
    labels: list[Tensor] = []
    keys: list[str] = []
    logits: dict[str, list[Tensor]] = {}
    features: list[Tensor] = []
    for batch in _batches(protocol, provider, device):
        labels.append(batch["labels"].cpu())
        keys += batch["keys"]
        image = provider.preprocess.normalize(batch["pixels"], batch["sizes"])
        batch_logits = {name: model(image)["logits"] for name, model in models.items()}
        for name, output in batch["outputs"].items():
            if name.endswith(".logits"):
                batch_logits[TEACHER] = output
            if name.endswith(f".{protocol.feature}"):
                features.append(output.flatten(1).float().cpu())
        for name, value in batch_logits.items():
            logits.setdefault(name, []).append(value.float().cpu())
    if protocol.quartiles and recipe.teacher is not None and not features:
        known = ", ".join(name.partition(".")[2] for name in provider.outputs)
        raise UserError(f"feature={protocol.feature}: the teacher has no such output. Known: {known}")
    joined = {name: torch.cat(values) for name, values in logits.items()}
    return torch.cat(labels).numpy(), keys, joined, torch.cat(features) if features else None


@torch.no_grad()
def _batches(protocol: Top1, provider: Provider, device: torch.device) -> Iterator[Batch]:
    places = list(every(provider.validation, protocol.batch))
    loaded = batches(provider.validation, places, protocol.workers)
    for batch in stop.between(progress(loaded, "top1", total=len(places))):
        batch = to_device(batch, device)
        yield batch if provider.complete is None else provider.complete(batch)


def _by_frequency(
    protocol: Top1, train_labels: np.ndarray, labels_N: np.ndarray, classes: int
) -> list[tuple[dict[str, str], np.ndarray]]:
    """Return the images of frequent, medium and rare classes, each as dimensions and a bool mask (N,)."""
    counts_K = np.bincount(train_labels[train_labels >= 0], minlength=classes)
    many_K, few_K = counts_K > protocol.many, counts_K < protocol.few
    groups = {"many": many_K, "medium": ~many_K & ~few_K, "few": few_K}
    return [({"frequency": name}, members_K[labels_N]) for name, members_K in groups.items()]
