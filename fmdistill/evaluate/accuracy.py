"""Measure classification: top-k accuracy by image, and means over the classes, with intervals over the images.

Letters: N images, K classes, T best classes, r resamples of the images.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from fmdistill.evaluate import intervals, results
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.results import TEACHER, Metric, Row

TOP = (1, 5)
RECALL, F1 = "mean_per_class_recall", "F1-macro_all"  # the second name is that of WILDS and DataComp
TOP_K = "Top-k: the share of images, × 100, whose class is among a classifier's k best."
CLASS_RECALL = "Class recall: top-1 class by class, their mean."
ACCURACY = {  # the metrics of `add_top` and `class_rows`
    "top1": Metric("top-1", percent=True, better="higher", end=TEACHER, help=TOP_K),
    "top5": Metric("top-5", percent=True, better="higher", end=TEACHER, help=TOP_K),
    RECALL: Metric("class recall", percent=True, better="higher", end=TEACHER, help=CLASS_RECALL),
}


def measure(best_NT: np.ndarray, labels_N: np.ndarray, classes: int) -> dict[str, float]:
    """Return {"top1", "top5", "mean_per_class_recall"}, as shares; top5 is left out if there are fewer classes."""
    right_NT = best_NT == labels_N[:, None]
    metrics = {f"top{k}": float(right_NT[:, :k].any(1).mean()) for k in TOP if k <= classes}
    return {**metrics, RECALL: class_mean(RECALL, best_NT[:, 0], labels_N, classes)}


def add_top(
    means: Means,
    subject: str,
    keys: Sequence[str],
    best_NT: np.ndarray,
    labels_N: np.ndarray,
    classes: int,
    **part: Any,
) -> None:
    """Add to `means` whether each image's label is among its k best classes, for each k that is at most K.

    `part` are the dimensions of a part of the images.
    """
    right_NT = best_NT == labels_N[:, None]
    for k in TOP:
        if k <= classes:
            means.add_each(keys, subject, f"top{k}", right_NT[:, :k].any(1), **part)


def class_rows(
    best: Mapping[str, np.ndarray],
    labels_N: np.ndarray,
    classes: int,
    metrics: Collection[str] = (RECALL,),
    **part: Any,
) -> list[Row]:
    """Return a row with its interval for each subject and metric over the classes.

    `best` are the classes, best first, int (N, T), by subject, and `part` dimensions.
    """
    rows = []
    for subject, best_NT in best.items():
        for metric in metrics:
            value = class_mean(metric, best_NT[:, 0], labels_N, classes)
            row = results.row(subject, metric, value, len(labels_N), **part)
            rows.append(row if len(labels_N) < 2 else with_class_interval(row, best_NT[:, 0], labels_N, classes))
    return rows


def with_class_interval(row: Row, predicted_N: np.ndarray, labels_N: np.ndarray, classes: int) -> Row:
    """Return the row of a metric over the classes with its interval: each resample of the images is scored anew."""
    label_KN, predicted_KN = (_one_hot(array_N, classes) for array_N in (labels_N, predicted_N))
    right_KN = label_KN * predicted_KN
    values = []
    for weight_rN in intervals.resamples(len(labels_N)):
        weight_Nr = np.ascontiguousarray(weight_rN.T)
        score_Kr = _scores(row["metric"], *(array_KN @ weight_Nr for array_KN in (right_KN, label_KN, predicted_KN)))
        values.append(np.nanmean(score_Kr, axis=0))
    return intervals.with_interval(row, np.concatenate(values), len(labels_N))


def class_mean(metric: str, predicted_N: np.ndarray, labels_N: np.ndarray, classes: int) -> float:
    """Return the mean recall, or F1, of the classes that have images; of recall scikit-learn's balanced accuracy."""
    right_K, label_K, predicted_K = (
        np.bincount(array_N, minlength=classes)
        for array_N in (labels_N[predicted_N == labels_N], labels_N, predicted_N)
    )
    score_K = _scores(metric, right_K, label_K, predicted_K)
    return float(score_K[label_K > 0].mean())


def _scores(metric: str, right: np.ndarray, labelled: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return each class's score from its numbers of images that are right, labelled and predicted as it.

    NaN for a class without images.
    """
    with np.errstate(invalid="ignore"):
        score = right / labelled if metric == RECALL else 2 * right / (labelled + predicted)
    return np.where(labelled > 0, score, np.nan)


def _one_hot(class_N: np.ndarray, classes: int) -> csr_array:
    places = (class_N, np.arange(len(class_N)))
    return csr_array((np.ones(len(class_N)), places), shape=(classes, len(class_N)))


def by_subject(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with those of each subject side by side, in the order in which the subjects first occur."""
    order = list(dict.fromkeys(row["subject"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["subject"]))
