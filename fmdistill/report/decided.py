"""Decide differences of runs by intervals over the images that both were judged on."""

from collections.abc import Mapping, Sequence

from fmdistill.evaluate import intervals
from fmdistill.evaluate.intervals import Ends, Entry, entry_key
from fmdistill.evaluate.results import STUDENT, Key, Metric
from fmdistill.report.rows import Interval, Run, TableRow

UNCORRECTED = 3  # with more runs or methods, intervals are corrected for the number of differences (Bonferroni)
Compared = tuple[TableRow, TableRow, Key]  # the value of the first row minus that of the second


def level(compared: int) -> float:
    """Return the level of the interval of a difference: 95 %, with more than three runs or methods corrected."""
    return 1 - (1 - intervals.LEVEL) / (compared - 1 if compared > UNCORRECTED else 1)


def about(rows: int) -> str:
    """Return what the interval of a difference is, if it is one of the differences among `rows` runs."""
    corrected = "" if level(rows) == intervals.LEVEL else f", corrected for {rows - 1} differences"
    return f"{100 * level(rows):.4g} % paired bootstrap over the images of both{corrected}"


def paired_intervals(compared: Sequence[Compared], rows: int) -> list[Interval | None]:
    """Return the interval of each difference among `rows` runs; None unless both have the same images' sums."""
    entries = [(of.per_image.get(key), base.per_image.get(key)) for of, base, key in compared]
    pairs = {place: (of, base) for place, (of, base) in enumerate(entries) if of is not None and base is not None}
    ends = dict(zip(pairs, intervals.differences(list(pairs.values()), level(rows)), strict=True))
    known = {place: Interval(*difference[1:], about(rows)) for place, difference in ends.items() if difference}
    return [known.get(place) for place in range(len(compared))]


def differences(rows: Sequence[TableRow]) -> list[TableRow]:
    """Return each row's difference to the first row, with the intervals that are known."""
    base, others = rows[0], rows[1:]
    compared = [(row, base, key) for row in others for key in row.cells if key in base.cells]
    cells: dict[str, dict[Key, float]] = {row.name: {} for row in others}
    ends: dict[str, dict[Key, Interval]] = {row.name: {} for row in others}
    for (row, _, key), interval in zip(compared, paired_intervals(compared, len(rows)), strict=True):
        cells[row.name][key] = row.cells[key] - base.cells[key]
        if interval is not None:
            ends[row.name][key] = interval
    return [TableRow(f"{row.name} − {base.name}", row.kind, cells[row.name], ends[row.name]) for row in others]


def best(runs: Sequence[TableRow], keys: Sequence[Key], metrics: Mapping[str, Metric]) -> dict[Key, str]:
    """Return the best run's name for each key, if the interval of its difference to each other run excludes zero."""
    signs = {"higher": 1, "lower": -1}
    compared: list[Compared] = []
    for key in keys:
        sign = signs.get(metrics.get(key[0], Metric("")).better or "", 0)
        having = [run for run in runs if key in run.cells]
        if sign and len(having) > 1:
            top = max(having, key=lambda run: sign * run.cells[key])
            compared += [(top, run, key) for run in having if run is not top]
    winners = {key: top.name for top, _, key in compared}
    for (_, _, key), interval in zip(compared, paired_intervals(compared, len(runs)), strict=True):
        sign = signs[metrics[key[0]].better or ""]
        if interval is None or min(sign * interval.low, sign * interval.high) <= 0:
            winners.pop(key, None)
    return winners


def over_images(
    runs: Mapping[str, Sequence[Run]], protocol: str, keys: Sequence[Key]
) -> dict[tuple[str, Key], tuple[Ends | None, Ends | None]]:
    """Return the intervals of each method's mean over its runs, and of its difference to the first method.

    Each is by (method, key) and over the images, for these runs; None if a run lacks the sums of the same images.
    """
    baseline = next(iter(runs))
    stored = {(name, key): _pooled(members, protocol, key) for name, members in runs.items() for key in keys}
    entries = {place: entry for place, entry in stored.items() if entry is not None}
    means = dict(zip(entries, intervals.of_entries(list(entries.values())), strict=True))
    pairs = {
        (name, key): (entry, entries[baseline, key])
        for (name, key), entry in entries.items()
        if name != baseline and (baseline, key) in entries
    }
    compared = dict(zip(pairs, intervals.differences(list(pairs.values()), level(len(runs))), strict=True))
    differences = {place: difference[1:] for place, difference in compared.items() if difference is not None}
    return {place: (means.get(place), differences.get(place)) for place in stored}


def _pooled(runs: Sequence[Run], protocol: str, key: Key) -> Entry | None:
    """Return the images' sums of the mean of the runs; None if a run lacks them."""
    entries = [
        entry
        for run in runs
        for entry in run.evaluations[protocol].per_image
        if entry["subject"] == STUDENT and entry_key(entry) == key
    ]
    return intervals.pooled(entries) if len(entries) == len(runs) else None
