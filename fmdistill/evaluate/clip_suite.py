"""Score image towers on many data sets: zero-shot classification and retrieval, and the average of their main metrics.

Letters: N images, K classes, D the shared embedding's width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fmdistill import stop, teachers
from fmdistill.backbones.device import pick_device
from fmdistill.evaluate import accuracy, annotated, results, retrieval, text_side, zeroshot
from fmdistill.evaluate.accuracy import ACCURACY
from fmdistill.evaluate.annotated import Embedded
from fmdistill.evaluate.clip_datasets import OpenedDataset, SuiteDataset, open_dataset
from fmdistill.evaluate.intervals import PER_IMAGE, Means
from fmdistill.evaluate.results import TEACHER, Judged, Metric, Row
from fmdistill.evaluate.retrieval import Retrieval
from fmdistill.evaluate.stored_results import Partial, images_state
from fmdistill.evaluate.teacher_score import check_weights
from fmdistill.evaluate.text_classifier import classifier
from fmdistill.evaluate.text_side import TextSide
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.teachers.family import Teacher

TOP = {"acc1": "top1", "acc5": "top5"}  # the metrics' names here
INTERVAL = "95 %, from the data sets' intervals (MOVER)"
MAIN = "Main metric: of each data set the one that counts, as the heading says."
AVERAGE = "Average: the mean of the data sets' main metrics, each data set with the same weight."


@dataclass(frozen=True)
class ClipSuite:
    """Zero-shot classification and retrieval on the data sets by name, and the average of their main metrics.

    A data set is a folder `folder` below `root`, in clip_benchmark's layout, with the name for {} (a / in it as -); or
    what `SuiteDataset` says. One whose files are missing is refused before anything is embedded; with `missing` skip
    it is left out, and the average states of how many it is. With `teacher`, the recipe's teacher is loaded and scored
    beside the students, in the same pass over the images, which are prepared as for it.
    """

    datasets: dict[str, SuiteDataset]
    root: str = "."
    folder: str = "{}"
    missing: Literal["refuse", "skip"] = "refuse"
    teacher: bool = False
    limit: int | None = None  # take only the first images of each data set
    batch: int = 64
    workers: int = 2
    device: str = "auto"
    dtype: annotated.DType = "fp32"

    metrics: ClassVar[Mapping[str, Metric]] = {
        "average": Metric("average", percent=True, better="higher", end=TEACHER, help=AVERAGE),
        "main_metric": Metric("main metric", across="dataset", percent=True, better="higher", end=TEACHER, help=MAIN),
        **{name: replace(metric, shown=False) for name, metric in {**ACCURACY, **Retrieval.metrics}.items()},
    }

    def __post_init__(self) -> None:
        """Raise a UserError for settings that measure nothing."""
        text_side.check_reading(self.batch, self.workers, self.limit)
        if not self.datasets:
            raise UserError("datasets: none is named; give a mapping of names to settings, such as {cars: {}}")
        for name, dataset in self.datasets.items():
            dataset.check(f"datasets.{name}")

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a run without a text tower, a missing teacher, and missing or unfit data sets."""
        text_side.check("clip_suite", recipe)
        if self.teacher:
            check_weights(recipe)
        _ = self._opened

    def check_images(self, recipe: Recipe) -> None:
        """Raise a UserError for class folders that do not match the names, or first images without annotations."""
        for opened in self._opened.values():
            opened.check_images()

    def inputs(self) -> list[Any]:
        """Return JSON of the data sets' images, class names and prompts."""
        return [
            [name, images_state(opened.settings), list(opened.names), list(opened.prompts)]
            for name, opened in self._opened.items()
        ]

    @cached_property
    def _opened(self) -> dict[str, OpenedDataset]:
        """The data sets whose files exist, by name."""
        opened = {}
        for name, dataset in self.datasets.items():
            try:
                opened[name] = open_dataset(name, dataset, self.root, self.folder)
            except UserError as error:
                if self.missing == "refuse":
                    raise UserError(f"{error}; missing=skip leaves such data sets out") from None
                log.warning("clip_suite: skips %s", error)
        if not opened:
            raise UserError(f"clip_suite: none of {len(self.datasets)} data sets exists; set root to their folder")
        return opened

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module], partial: Partial | None = None) -> Judged:
        """Score the students by name, and the teacher if requested; a data set that `partial` has is not repeated."""
        self.check_images(recipe)
        done = {} if partial is None else dict(partial.done)
        left = [opened for name, opened in self._opened.items() if name not in done]
        if left:
            side = text_side.of_run(recipe, students, left[0].settings, "clip_suite")
            teacher = teachers.build(recipe.teacher or {}) if self.teacher else None
            for opened in stop.between(left):
                done[opened.name] = self._score(opened, side, students, teacher)
                if partial is not None:
                    partial.add(opened.name, done[opened.name])
        scored = [done[name] for name in self._opened]
        rows = [row for result in scored for row in result["rows"]]
        skipped = [name for name in self.datasets if name not in self._opened]
        over = f"{len(scored)} of {len(self.datasets)} data sets" if skipped else f"{len(scored)} data sets"
        log.info("clip_suite: the average is over %s", over)
        described = {name: done[name]["dataset"] for name in self._opened}
        per_image = [entry for result in scored for entry in result[PER_IMAGE]]
        return [*averages(rows, over), *rows], {"datasets": described, "skipped": skipped, PER_IMAGE: per_image}

    def _score(
        self, opened: OpenedDataset, side: TextSide, students: Mapping[str, nn.Module], teacher: Teacher | None
    ) -> dict[str, Any]:
        """Return a data set's rows, its description, and each image's part in the main metric, as JSON."""
        device, recall = pick_device(self.device, "device"), opened.dataset.recall
        data = replace(side.data, images=opened.images, captioned=recall is not None)
        number = list(self._opened).index(opened.name) + 1
        title = f"{opened.name} ({number} of {len(self._opened)})"
        reading = (self.batch, self.workers, self.limit, self.dtype, teacher)
        embedded = annotated.embed(data, students, device, title, *reading)
        if recall is not None:
            means, details = retrieval.collect(embedded, side.head.to(device))
            rows, described = means.rows(), {name: details[name] for name in ("captions", "empty")}
            main = _recall_rows(means, rows, list(embedded.embeddings), *recall)
        else:
            weight_DK = classifier(side.head, opened.names, opened.prompts, device, side.folder)
            means, rows, main = _classified(opened, embedded, weight_DK)
            described = {"classes": len(opened.names), "templates": len(opened.prompts)}
        if len(main) < len(embedded.embeddings):
            raise UserError(
                f"{opened.name}: metric={opened.dataset.metric} needs more targets than its {len(embedded.keys)} "
                f"images have; choose a smaller k"
            )
        entries = means.details(keys=False)[PER_IMAGE]
        counting = [entry for entry in entries if all(entry.get(name) == main[0].get(name) for name in ("metric", "k"))]
        return {
            "rows": [_main(row, opened) for row in main] + [{**row, "dataset": opened.name} for row in rows],
            "dataset": {"metric": opened.dataset.metric, "images": len(embedded.keys), **described},
            PER_IMAGE: [_main(entry, opened) for entry in counting],
        }


def _classified(opened: OpenedDataset, embedded: Embedded, weight_DK: Tensor) -> tuple[Means, list[Row], list[Row]]:
    """Return the means over images, all rows, and the rows of the main metric."""
    classes = len(opened.names)
    labels_N = zeroshot.label_array(embedded, classes)
    best = {name: zeroshot.top(embedding_ND, weight_DK, name) for name, embedding_ND in embedded.embeddings.items()}
    means, metric = Means(), TOP.get(opened.dataset.metric, opened.dataset.metric)
    for name, best_NT in best.items():
        accuracy.add_top(means, name, embedded.keys, best_NT, labels_N, classes)
    rows = accuracy.by_subject([*means.rows(), *accuracy.class_rows(best, labels_N, classes)])
    if metric == accuracy.F1:
        return means, rows, accuracy.class_rows(best, labels_N, classes, (metric,))
    return means, rows, [row for row in rows if row["metric"] == metric]


def _recall_rows(means: Means, rows: Sequence[Row], subjects: Sequence[str], kind: str, k: int) -> list[Row]:
    """Return the rows of the main metric, without a subject whose targets are fewer than k."""
    if kind == "mean_recall":
        return [row for name in subjects if (row := retrieval.mean_recall(means, name, k)) is not None]
    return [row for row in rows if row["metric"] == kind.removesuffix("_recall") and row["k"] == k]


def _main(entry: Mapping[str, Any], opened: OpenedDataset) -> dict[str, Any]:
    """Return a row, or the values of single images, as those of the data set's main metric."""
    named = {"metric": "main_metric", "dataset": opened.name, "measure": opened.dataset.metric}
    return {name: value for name, value in entry.items() if name != "k"} | named


def averages(rows: Sequence[Row], over: str) -> list[Row]:
    """Return the mean of each subject's main metrics, with an interval if every data set has one.

    `over` says over how many data sets. The interval combines theirs (MOVER: Zou and Donner, Statistics in Medicine
    2008), which are independent of each other; it does not say what other data sets would give.
    """
    averaged = []
    for subject in dict.fromkeys(row["subject"] for row in rows):
        main = [row for row in rows if row["subject"] == subject and row["metric"] == "main_metric"]
        mean = math.fsum(row["value"] for row in main) / len(main)
        average = results.row(subject, "average", mean, len(main), over=over)
        if all("low" in row for row in main):
            below, above = (
                math.sqrt(math.fsum((row["value"] - row[end]) ** 2 for row in main)) / len(main)
                for end in ("low", "high")
            )
            average |= {"low": mean - below, "high": mean + above, "interval": INTERVAL}
        averaged.append(average)
    return averaged
