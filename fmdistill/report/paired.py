"""Compare methods run with the same seeds: paired differences, their confidence intervals, and a verdict.

Letters: S seeds, M methods, the first of them the baseline.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from fmdistill.evaluate import intervals, results
from fmdistill.evaluate.intervals import Ends
from fmdistill.evaluate.results import STUDENT, Key, Metric
from fmdistill.report import decided
from fmdistill.report.rows import Run

QUICK_RUN = 60.0  # seconds of training below which a verdict needs QUICK_SEEDS
QUICK_SEEDS, SEEDS = 8, 5  # needed for a verdict


@dataclass(frozen=True)
class Line:
    """One method's result on one metric over its seeds, and its difference to the baseline with the same seeds.

    The interval is Student's t interval of the S paired differences at 95 %; with more than three methods at
    1 - 5 % / (M - 1) (Bonferroni), so that all intervals of a metric hold together at 95 %. The verdict is by it.
    `over_images` and `difference_over_images` are the bootstrap intervals of these seeds' mean and difference over the
    images, at the same levels; None if the runs' results lack the sums of the same images.
    """

    method: str
    metric: str
    dimensions: dict[str, Any]
    percent: bool  # whether the values are shares, shown times 100
    seeds: int
    mean: float
    deviation: float  # between seeds
    difference: float | None  # None for the baseline
    low: float | None
    high: float | None
    verdict: str
    effective_sample_size: float | None  # the smallest of the terms', averaged over the logged steps and the seeds
    over_images: Ends | None = None
    difference_over_images: Ends | None = None


def compare(runs: Mapping[str, Sequence[Run]], protocol: str) -> list[Line]:
    """Return a line for each metric and method.

    `runs` are each method's, the baseline first; every method's are in the same order of seeds.
    """
    methods = list(runs)
    required = seeds_needed(runs)
    lines = []
    keys = _keys(runs, protocol)
    over_images = decided.over_images(runs, protocol, keys)
    for key in keys:
        metric = runs[methods[0]][0].evaluations[protocol].metric(key[0])
        values = {name: _values(runs[name], protocol, key) for name in methods}
        for name in methods:
            difference, low, high = (None, None, None)
            if name != methods[0]:
                difference, low, high = interval(np.subtract(values[name], values[methods[0]]), len(methods))
            mean, deviation = float(np.mean(values[name])), _deviation(values[name])
            count, ess = len(values[name]), _effective_sample_size(runs[name])
            verdict = _verdict(difference, low, high, count, required, metric)
            compared = (mean, deviation, difference, low, high, verdict, ess)
            ends = over_images[name, key]
            lines.append(Line(name, key[0], dict(key[1]), metric.percent, count, *compared, *ends))
    return lines


def interval(difference_S: np.ndarray, methods: int = 2) -> tuple[float, float, float]:
    """Return the mean of paired differences and the ends of its interval, which are infinite for a single seed."""
    count, mean = len(difference_S), float(np.mean(difference_S))
    if count < 2:
        return mean, -math.inf, math.inf
    quantile = float(stats.t.ppf((1 + decided.level(methods)) / 2, count - 1))
    half = quantile * float(np.std(difference_S, ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half


def seeds_needed(runs: Mapping[str, Sequence[Run]]) -> int:
    """Return the number of seeds needed for a verdict: eight if training takes less than a minute, else five."""
    durations = [_seconds(run) for method_runs in runs.values() for run in method_runs]
    seconds = [duration for duration in durations if duration is not None]
    return QUICK_SEEDS if seconds and statistics.median(seconds) < QUICK_RUN else SEEDS


def text(lines: Sequence[Line]) -> str:
    """Format the lines as one Markdown table per metric; shares are shown times 100, other metrics unscaled."""
    text_lines = []
    for heading in dict.fromkeys(_heading(line) for line in lines):
        members = [line for line in lines if _heading(line) == heading]
        images = any(line.over_images is not None for line in members)
        columns = ["method", "mean", *(["over images"] if images else []), "sd", "difference", "over seeds"]
        columns += [*(["over images"] if images else []), "", "ESS"]
        text_lines += [f"**{heading}**, {members[0].seeds} seeds, differences to {members[0].method}", ""]
        text_lines += [_joined(columns), "|" + "---|" * len(columns)]
        text_lines += [_joined(_row(line, images)) for line in members] + [""]
        text_lines += [_about(len(members), images), ""]
    return "\n".join(text_lines).rstrip()


def _about(methods: int, images: bool) -> str:
    """Return what the intervals of a table are."""
    corrected = (
        f", of differences {100 * decided.level(methods):.4g} %" if decided.level(methods) != intervals.LEVEL else ""
    )
    seeds = "over seeds: Student's t interval of the paired differences, by which the verdict is"
    bootstrap = "; over images: bootstrap interval of these seeds' mean or difference over the images"
    return f"Intervals at 95 %{corrected}; {seeds}{bootstrap if images else ''}."


def _heading(line: Line) -> str:
    return results.shown(results.key({"metric": line.metric, **line.dimensions}))


def _row(line: Line, images: bool) -> list[str]:
    scale, form = (100.0, ".2f") if line.percent else (1.0, ".4g")

    def number(value: float, sign: str = "") -> str:
        return f"{scale * value:{sign}{form}}"

    def ends(pair: tuple[float, float] | None, sign: str = "") -> str:
        return "" if pair is None else f"{number(pair[0], sign)} to {number(pair[1], sign)}"

    over_images = ([ends(line.over_images)], [ends(line.difference_over_images, "+")]) if images else ([], [])
    start = [line.method, number(line.mean), *over_images[0], number(line.deviation)]
    ess = "" if line.effective_sample_size is None else f"{line.effective_sample_size:.3f}"
    if line.difference is None or line.low is None or line.high is None:
        return [*start, "", "", *over_images[1], line.verdict, ess]
    seeds = ends((line.low, line.high), "+")
    return [*start, number(line.difference, "+"), seeds, *over_images[1], line.verdict, ess]


def _joined(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _verdict(
    difference: float | None, low: float | None, high: float | None, seeds: int, required: int, metric: Metric
) -> str:
    """Return the verdict of an interval; "higher" or "lower" if the metric does not say which is better."""
    if difference is None or low is None or high is None:
        return "baseline"
    if seeds < required:
        return f"not decided: {seeds} of {required} seeds"
    if low <= 0 <= high:
        return "not decided"
    direction = "higher" if low > 0 else "lower"
    if metric.better is None:
        return direction
    return "better" if direction == metric.better else "worse"


def _keys(runs: Mapping[str, Sequence[Run]], protocol: str) -> list[Key]:
    """Return the student's metrics, with dimensions, that are numbers in every run, in the first run's order."""
    students = [_student(run, protocol) for method_runs in runs.values() for run in method_runs]
    return [key for key in students[0] if all(results.is_number(cells.get(key)) for cells in students)]


def _student(run: Run, protocol: str) -> dict[Key, float]:
    rows = run.evaluations[protocol].rows
    return {results.key(row): row["value"] for row in rows if row["subject"] == STUDENT}


def _values(runs: Sequence[Run], protocol: str, key: Key) -> np.ndarray:
    return np.array([_student(run, protocol)[key] for run in runs])


def _deviation(values_S: np.ndarray) -> float:
    return float(np.std(values_S, ddof=1)) if len(values_S) > 1 else 0.0


def _effective_sample_size(runs: Sequence[Run]) -> float | None:
    ending = "/effective_sample_size"
    rows = [
        [value for name, value in row.items() if name.endswith(ending) and not name.startswith("validation/")]
        for run in runs
        for stage in run.stages.values()
        for row in stage.log
    ]
    smallest = [min(row) for row in rows if row]  # not the mean, which an unweighted term of labels would raise
    return statistics.fmean(smallest) if smallest else None


def _seconds(run: Run) -> float | None:
    """Return the seconds of training, in all stages, None if the logs do not tell."""
    seconds = 0.0
    for stage in run.stages.values():
        rows = [row for row in stage.log if "images_per_second" in row]
        if not rows or not rows[-1]["images_per_second"]:
            return None
        seconds += rows[-1]["step"] * stage.recipe.train.batch_size / rows[-1]["images_per_second"]
    return seconds
