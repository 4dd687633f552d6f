"""Average precision and recall of matched detections, with bootstrap intervals over the images.

pycocotools accumulates the figures themselves. Their resamples come from the same definition with a weight for each
image, since accumulating anew for each resample would take minutes.

Letters: I images, R resamples, K categories, D detections of a category on all images, A area ranges, T IoU thresholds,
L limits on the number of detections, P detections that match.
"""

import contextlib
import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from fmdistill.evaluate import intervals
from fmdistill.evaluate.matching import AREAS, IOUS_T, Annotation, Matches, Rules, match

RESAMPLES = 200
INTERVAL = f"95 % bootstrap over images, {RESAMPLES} resamples"
CHUNK = 2**22  # weights of detections in memory at once
FREQUENCIES = "rcf"  # LVIS's rare, common and frequent categories


@dataclass(frozen=True)
class PrecisionTable:
    """Precision (.., K, T, A), the mean over recalls, and recall (.., K, T, A, L); NaN for what has no objects."""

    precision: np.ndarray
    recall: np.ndarray


@dataclass
class Precision:
    """AP and AR of images that are added one by one; `frequencies` are LVIS's groups of categories, if it is LVIS.

    Stored are the matches, a few bytes for each detection, and no masks.
    """

    rules: Rules
    frequencies: Mapping[int, str] = field(default_factory=dict)
    images: int = 0
    by_category: dict[int, tuple[list[int], list[Matches]]] = field(default_factory=dict)  # numbers of images, matches

    def add(
        self, objects: Iterable[Annotation], detections: Iterable[Annotation], unfinished: Collection[int] = ()
    ) -> None:
        """Add an image, as for `matching.match`. Add images by ascending id: it decides between equal scores."""
        self.add_matches(match(objects, detections, self.rules, unfinished))

    def add_matches(self, matches: Mapping[int, Matches]) -> None:
        """Add an image that is matched already."""
        for category, entry in matches.items():
            numbers, entries = self.by_category.setdefault(category, ([], []))
            numbers.append(self.images)
            entries.append(entry)
        self.images += 1

    def figures(self) -> dict[str, float]:
        """Return AP, AP50, AR and so on by name, from 0 to 1; NaN for those that have no objects."""
        tables = [accumulate(entries, self.rules) for _, entries in self._sorted()]
        return {name: float(value) for name, value in self._named(tables).items()}

    def resampled(self) -> dict[str, np.ndarray]:
        """Return the figures of each resample of the images, float64 (R,) each."""
        weights_RI = np.concatenate(list(intervals.resamples(self.images, count=RESAMPLES)))
        tables = [weighted(entries, weights_RI[:, numbers], self.rules) for numbers, entries in self._sorted()]
        return self._named(tables)

    def _sorted(self) -> Iterator[tuple[list[int], list[Matches]]]:
        yield from (self.by_category[category] for category in sorted(self.by_category))

    def _named(self, tables: Sequence[PrecisionTable]) -> dict[str, np.ndarray]:
        if not tables:
            return {}
        table = PrecisionTable(np.stack([t.precision for t in tables], -3), np.stack([t.recall for t in tables], -4))
        groups = [self.frequencies.get(category, "") for category in sorted(self.by_category)]
        return dict(named(table, groups, self.rules))


def interval(value: float, resampled_R: np.ndarray, images: int) -> tuple[float, float]:
    """Return the ends of the interval of a figure of `images` images: its resamples', moved to have it as their mean.

    AP grows as a set shrinks, since it takes the best precision at a recall or above, and a resample has fewer
    different images than the set. The interval is of sets of the same number of images; on more images AP is lower.
    """
    finite_R = resampled_R[np.isfinite(resampled_R)]
    low, high = intervals.ends(finite_R, images)
    bias = float(finite_R.mean()) - value
    return max(0.0, low - bias), min(1.0, high - bias)


def accumulate(matches: Sequence[Matches], rules: Rules) -> PrecisionTable:
    """Return precision (T, A) and recall (T, A, L) of one category on the images, from COCOeval.accumulate."""
    evaluation: Any = COCOeval(iouType="segm")
    evaluation.params.imgIds, evaluation.params.catIds = list(range(len(matches))), [0]
    evaluation.params.maxDets = list(rules.limits)
    evaluation._paramsEval = evaluation.params  # what `evaluate` would set
    evaluation.evalImgs = [_entry(entry, area) for area in range(len(AREAS)) for entry in matches]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    precision_TRA, recall_TAL = evaluation.eval["precision"][:, :, 0, :, -1], evaluation.eval["recall"][:, 0]
    missing_A = precision_TRA[0, 0] < 0
    return PrecisionTable(
        np.where(missing_A, np.nan, precision_TRA.mean(1)), np.where(missing_A[:, None], np.nan, recall_TAL)
    )


def _entry(matches: Matches, area: int) -> dict[str, Any]:
    return {
        "dtScores": matches.scores_D,
        "dtMatches": matches.matched_ATD[area],
        "dtIgnore": matches.ignored_ATD[area],
        "gtIgnore": np.zeros(matches.objects_A[area]),  # those that are ignored have no other effect
    }


def weighted(matches: Sequence[Matches], weights_RI: np.ndarray, rules: Rules) -> PrecisionTable:
    """Return precision (R, T, A) and recall (R, T, A, L) if each image occurs as often as its weight says.

    With weights of one, this is `accumulate`. An image's copies follow one another between equal scores.
    """
    limits, resamples = rules.limits, len(weights_RI)
    precision_RTA = np.full((resamples, len(IOUS_T), len(AREAS)), np.nan)
    recall_RTAL = np.full((*precision_RTA.shape, len(limits)), np.nan)
    order = np.argsort(-np.concatenate([entry.scores_D for entry in matches]), kind="stable")
    image_D = np.repeat(np.arange(len(matches)), [len(entry.scores_D) for entry in matches])[order]
    rank_D = np.concatenate([np.arange(len(entry.scores_D)) for entry in matches])[order]  # within the image
    matched_ATD, ignored_ATD = (
        np.concatenate([getattr(entry, name) for entry in matches], axis=2)[:, :, order]
        for name in ("matched_ATD", "ignored_ATD")
    )
    objects_RA = weights_RI @ np.stack([entry.objects_A for entry in matches])
    step = max(1, CHUNK // max(1, len(order)))
    for start in range(0, resamples, step):
        part = slice(start, start + step)
        weights_rD = weights_RI[part][:, image_D]
        for area in range(len(AREAS)):
            objects_r = np.where(objects_RA[part, area] > 0, objects_RA[part, area], np.nan)
            for threshold in range(len(IOUS_T)):
                counted_D = ~ignored_ATD[area, threshold]
                right_D = matched_ATD[area, threshold] & counted_D
                for number, limit in enumerate(limits):
                    hits_r = weights_rD @ (right_D & (rank_D < limit))
                    recall_RTAL[part, threshold, area, number] = hits_r / objects_r
                within_D = rank_D < limits[-1]
                curve = _precision(weights_rD, right_D & within_D, counted_D & within_D, objects_r)
                precision_RTA[part, threshold, area] = curve
    return PrecisionTable(precision_RTA, recall_RTAL)


def _precision(weights_RD: np.ndarray, right_D: np.ndarray, counted_D: np.ndarray, objects_R: np.ndarray) -> np.ndarray:
    """Return the mean over 101 recalls of the highest precision at that recall or more, float64 (R,)."""
    recalls = COCOeval(iouType="segm").params.recThrs
    places_P = np.flatnonzero(right_D)
    right_RP = np.cumsum(weights_RD[:, places_P], 1)
    counted_RP = np.cumsum(weights_RD * counted_D, 1)[:, places_P]
    precision_RP = right_RP / (counted_RP + np.spacing(1))
    highest_RP = np.maximum.accumulate(precision_RP[:, ::-1], 1)[:, ::-1]
    reached_RP = np.searchsorted(recalls, right_RP / objects_R[:, None], side="right")
    total_R = (highest_RP * np.diff(reached_RP, axis=1, prepend=0)).sum(1)
    return np.where(np.isnan(objects_R), np.nan, total_R / len(recalls))


def named(table: PrecisionTable, groups: Sequence[str], rules: Rules) -> Iterable[tuple[str, np.ndarray]]:
    """Yield the name and the value of each figure: a mean over the categories that have objects, then thresholds."""
    areas, at = list(AREAS), {round(float(iou), 2): number for number, iou in enumerate(IOUS_T)}
    precision, recall, most = table.precision, table.recall, rules.limits[-1]
    yield "AP", _mean(precision[..., 0])
    for name, iou in (("AP50", 0.5), ("AP75", 0.75)):
        yield name, _mean(precision[..., at[iou], 0][..., None])
    for number, area in enumerate(areas[1:], start=1):
        yield f"AP{area[0]}", _mean(precision[..., number])
    if rules.classes and any(groups):
        for frequency in FREQUENCIES:
            yield f"AP{frequency}", _mean(precision[..., [group == frequency for group in groups], :, 0])
    for number, limit in enumerate(rules.limits):
        yield f"AR@{limit}", _mean(recall[..., 0, number])
    for number, area in enumerate(areas[1:], start=1):
        yield f"AR{area[0]}@{most}", _mean(recall[..., number, -1])


def _mean(values_KT: np.ndarray) -> np.ndarray:
    """Return the mean over the last two axes without NaN; NaN if nothing is left."""
    known = ~np.isnan(values_KT)
    with np.errstate(invalid="ignore"):
        return np.where(known, values_KT, 0).sum((-2, -1)) / known.sum((-2, -1))
