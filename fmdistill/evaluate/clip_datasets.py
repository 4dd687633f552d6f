"""Find the data sets of a suite: folders in clip_benchmark's layout, or any source of images with class names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fmdistill import images as image_sources
from fmdistill.evaluate import accuracy, annotated, text_classifier
from fmdistill.images import Images
from fmdistill.recipe import Component
from fmdistill.registry import UserError
from fmdistill.text import read_text

CLASSIFICATION = ("acc1", "acc5", accuracy.RECALL, accuracy.F1)
RECALL_AT = re.compile(r"(image_retrieval_recall|text_retrieval_recall|mean_recall)@(1|5|10)")
NAMES, TEMPLATES, KIND, COUNT = (
    "classnames.txt",
    "zeroshot_classification_templates.txt",
    "dataset_type.txt",
    "nshards.txt",
)
LAYOUT = f"{NAMES}, {TEMPLATES} and test/{COUNT}, test/0.tar, ..."


@dataclass(frozen=True)
class SuiteDataset:
    """A data set of a suite, and the metric by which it counts.

    `folder` is a folder in clip_benchmark's layout, below the suite's `root`; null means the suite's pattern. `images`
    is a source of validation images instead. `classnames` and `templates` replace the folder's files and are needed
    with `images`; see `Zeroshot`. A `metric` of retrieval ("mean_recall@1") needs captions instead of labels.
    """

    metric: str = "acc1"
    folder: str | None = None
    images: Component | None = None
    classnames: str | list[str] | None = None
    templates: str | list[str] | None = None
    split: str = "test"  # of the folder

    @property
    def recall(self) -> tuple[str, int] | None:
        """The kind of recall and its k, such as ("mean_recall", 1); None for a metric of classification."""
        match = RECALL_AT.fullmatch(self.metric)
        return (match[1], int(match[2])) if match else None

    def check(self, where: str) -> None:
        """Raise a UserError, beginning with `where`, for settings that are wrong whatever is on the disk."""
        if self.metric not in CLASSIFICATION and self.recall is None:
            raise UserError(
                f"{where}.metric={self.metric}: unknown; give {', '.join(CLASSIFICATION)}, or mean_recall@1, "
                f"image_retrieval_recall@1, text_retrieval_recall@1 (or @5, @10)"
            )
        if self.images is not None:
            image_sources.check(self.images)
            if self.folder is not None:
                raise UserError(f"{where}: has `folder` and `images`; give one of them")
            if self.recall is None and (self.classnames is None or self.templates is None):
                raise UserError(
                    f"{where}: `images` without a folder's files need `classnames` (a file or a list) and `templates` "
                    f"(openai, simple, a file or a list)"
                )
        if self.recall is not None and (self.classnames is not None or self.templates is not None):
            raise UserError(f"{where}: metric={self.metric} compares captions; remove classnames and templates")
        if self.classnames is not None:
            text_classifier.class_names(self.classnames)
        if self.templates is not None:
            text_classifier.templates(self.templates)


@dataclass(frozen=True)
class OpenedDataset:
    """A data set whose files exist: its images' settings, and for classification class names and prompts."""

    name: str
    dataset: SuiteDataset
    settings: Mapping[str, Any]
    names: Sequence[str] = ()
    prompts: Sequence[str] = ()

    @cached_property
    def images(self) -> Images:
        """The images."""
        return image_sources.build(self.settings)

    def check_images(self) -> None:
        """Raise a UserError if the class folders or the first image's label or captions do not fit the metric."""
        encoded = annotated.first_image(self.images, self.name)
        if self.dataset.recall is not None:
            if encoded.caption_column not in encoded.extra:
                raise UserError(
                    f"{self.name}: image '{encoded.key}' has no caption; {self.dataset.metric} needs KEY.txt"
                )
            return
        count = len(self.names)
        text_classifier.check_classes(self.images, self.dataset.classnames or f"{self.name}'s own", count)
        if encoded.label is None or encoded.label >= count:
            label = "no label" if encoded.label is None else f"label {encoded.label}"
            raise UserError(
                f"{self.name}: image '{encoded.key}' has {label}, and the data set {count} class names; it needs "
                f"labels from 0 to {count - 1}, by KEY.cls or class folders"
            )


def open_dataset(name: str, dataset: SuiteDataset, root: str, pattern: str) -> OpenedDataset:
    """Return the data set called `name`. Raises UserError if its images or the folder's files are missing.

    Its folder is `pattern` below `root`, with the name for {} (a / in it as -).
    """
    if dataset.images is not None:
        opened = OpenedDataset(name, dataset, dataset.images, *_texts(dataset, None))
    else:
        folder = Path(root).expanduser() / (dataset.folder or pattern.replace("{}", name.replace("/", "-")))
        count = folder / dataset.split / COUNT
        if not count.is_file():
            raise UserError(f"{name}: {count} does not exist; expected clip_benchmark's layout: {LAYOUT}")
        _check_kind(name, dataset, folder)
        tars = [f"{number}.tar" for number in range(_number(count))]
        settings = {"name": "tar", "root": str(folder / dataset.split), "validation": tars}
        opened = OpenedDataset(name, dataset, settings, *_texts(dataset, folder))
    opened.images.shards()  # looks for the files
    if dataset.metric == "acc5" and len(opened.names) < 5:
        raise UserError(f"{name}: metric=acc5, but it has {len(opened.names)} classes; use acc1")
    return opened


def _texts(dataset: SuiteDataset, folder: Path | None) -> tuple[list[str], list[str]]:
    """Return class names and prompts, the data set's own or the folder's; none for retrieval."""
    if dataset.recall is not None:
        return [], []
    names = dataset.classnames if folder is None or dataset.classnames else str(folder / NAMES)
    prompts = dataset.templates if folder is None or dataset.templates else str(folder / TEMPLATES)
    return text_classifier.class_names(names or ""), text_classifier.templates(prompts or "")


def _check_kind(name: str, dataset: SuiteDataset, folder: Path) -> None:
    """Raise a UserError if the folder says that it is for another task; without the file it is for classification."""
    file = folder / KIND
    kind = read_text(file, name).strip().lower() if file.is_file() else "zeroshot_classification"
    if kind == "multilabel":
        raise UserError(f"{name}: {file} says multilabel; images of several labels (KEY.npy) are not supported")
    if (kind == "retrieval") != (dataset.recall is not None):
        raise UserError(f"{name}: {file} says {kind}, which has no metric={dataset.metric}; set another metric")


def _number(file: Path) -> int:
    text = read_text(file, COUNT).strip()
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) == 0:
        raise UserError(f"{file}: contains {text[:40]!r}, expected the number of tars")
    return int(text)
