"""Collect the values of parts of the images, such as buckets of size, from the rows of any evaluator, for bars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fmdistill.evaluate import results
from fmdistill.evaluate.results import Key, Metric
from fmdistill.report.rows import Interval, TableRow

PARTS = ("bucket", "size", "edge", "group", "quartile", "frequency")  # dimensions whose values are parts of the images


@dataclass(frozen=True)
class Bars:
    """One metric by the parts of the images: each row's values and intervals by its name, in the order of `labels`."""

    title: str
    labels: list[str]
    values: dict[str, list[float | None]]
    intervals: dict[str, list[Interval | None]]
    percent: bool

    @property
    def kinds(self) -> list[str]:
        """Return what the intervals are."""
        return list(dict.fromkeys(end.of for ends in self.intervals.values() for end in ends if end and end.of))


def gather(rows: Sequence[TableRow], metrics: Mapping[str, Metric]) -> list[Bars]:
    """Return bars of the runs for each shown metric, part and combination of other dimensions.

    Values of one dimension that all begin with a word and "_", such as area_below_1% and edge_below_1%, are parts of
    several kinds and have bars of their own.
    """
    runs = [row for row in rows if row.kind == "run"]
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.cells) if _shown(key, metrics)]
    bars = []
    for part in PARTS:
        panels: dict[tuple[str, Key], dict[str, Key]] = {}
        having = [key for key in keys if part in dict(key[1])]
        several = _several_kinds([str(dict(key[1])[part]) for key in having])
        for key in having:
            value = str(dict(key[1])[part])
            kind, _, label = value.partition("_") if several else (part, "", value)
            rest = key[0], tuple(pair for pair in key[1] if pair[0] != part)
            panels.setdefault((kind, rest), {})[label.replace("_", " ")] = key
        bars += [
            _bars(runs, kind, rest, by_label, metrics.get(rest[0], Metric(rest[0])))
            for (kind, rest), by_label in panels.items()
            if len(by_label) > 1
        ]
    return bars


def _shown(key: Key, metrics: Mapping[str, Metric]) -> bool:
    return key[0] not in metrics or metrics[key[0]].shown


def _several_kinds(values: Sequence[str]) -> bool:
    """Return whether each value begins with a word and "_", and there are several such words."""
    return all("_" in value for value in values) and len({value.partition("_")[0] for value in values}) > 1


def _bars(runs: Sequence[TableRow], kind: str, rest: Key, by_label: Mapping[str, Key], metric: Metric) -> Bars:
    others = ", ".join(results.label(*pair) for pair in rest[1])
    return Bars(
        title=f"{metric.heading} by {kind}" + (f", {others}" if others else ""),
        labels=list(by_label),
        values={run.name: [run.cells.get(key) for key in by_label.values()] for run in runs},
        intervals={run.name: [run.intervals.get(key) for key in by_label.values()] for run in runs},
        percent=metric.percent,
    )
