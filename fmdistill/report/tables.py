"""Build a table from rows: runs, their differences, teachers, floors, and papers' rows, with intervals."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from fmdistill.evaluate import results
from fmdistill.evaluate.results import TEACHER, Key, Metric
from fmdistill.report import decided
from fmdistill.report.rows import Published, TableRow

ABOUT_BEST = "Bold: the best run, if the interval of its difference to each other run excludes zero."


@dataclass(frozen=True)
class Column:
    """A column of one metric and its dimensions; `group` is the heading shared with neighbouring columns.

    `percent` values are shown times 100.
    """

    key: Key
    group: str
    label: str
    percent: bool


@dataclass(frozen=True)
class Section:
    """Rows under one heading; `signed` values are differences, shown with their sign."""

    heading: str
    kind: str
    rows: list[TableRow]
    signed: bool = False


@dataclass(frozen=True)
class Table:
    """Columns, and sections of rows; a cell is empty if its row lacks the column's metric.

    `best` are the names of the runs that are decided to be the best, by column; `notes` say what the intervals are of.
    """

    columns: list[Column]
    sections: list[Section]
    best: dict[Key, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def build(rows: list[TableRow], metrics: Mapping[str, Metric], papers: list[Published] | None = None) -> Table:
    """Build the table of runs, their differences, teachers, floors, shares of the gap closed, and papers' rows.

    `metrics` are the evaluator's descriptions by name; a metric without one is shown under its name, unscaled.
    """
    runs, teachers, floors = ([r for r in rows if r.kind == kind] for kind in ("run", "teacher", "floor"))
    columns = _columns(runs, metrics)
    sections = [Section("Runs", "run", runs)]
    if len(runs) > 1:
        sections.append(Section(f"Difference to {runs[0].name}", "difference", decided.differences(runs), signed=True))
    if teachers:
        sections.append(Section("Teacher: what a student imitates", "teacher", teachers))
    if floors:
        sections.append(Section("Floors: what a student must beat", "floor", floors))
        closed = [_closed(run, floors, teachers, metrics) for run in runs]
        if any(row.cells for row in closed):
            sections.append(Section("Share of the way from the best floor to the teacher (100)", "closed", closed))
    for paper in papers or []:
        shown = [row for row in paper.rows if row.cells.keys() & {column.key for column in columns}]
        if shown:
            sections.append(Section(f"Published: {paper.source}. {paper.setting}", "published", shown))
            differences = decided.differences(shown)
            sections.append(Section(f"Published difference to {shown[0].name}", "published", differences, signed=True))
    best = decided.best(runs, [column.key for column in columns], metrics)
    return Table(columns, sections, best, _notes(sections, columns, bool(best)))


def _columns(runs: list[TableRow], metrics: Mapping[str, Metric]) -> list[Column]:
    keys = list(dict.fromkeys(key for run in runs for key in run.cells))
    by_key = {key: metrics.get(key[0], Metric(key[0])) for key in keys}
    columns = [_column(key, by_key[key]) for key in keys if by_key[key].shown]
    order = list(dict.fromkeys(column.group for column in columns))
    return sorted(columns, key=lambda column: order.index(column.group))  # 5x5, 5x5 of photos, 16x16, ...


def _column(key: Key, metric: Metric) -> Column:
    dimensions = {name: results.label(name, value) for name, value in key[1]}
    group = metric.heading
    if metric.across is not None:
        rest = [text for name, text in dimensions.items() if name != metric.across]
        group = f"{metric.heading}, {', '.join(rest) or 'all images'}"
        dimensions = {name: text for name, text in dimensions.items() if name == metric.across}
    label = re.sub(r"(?<=\d)x(?=\d)", "×", ", ".join(dimensions.values()) or metric.label)
    return Column(key, group, label, metric.percent)


def _notes(sections: list[Section], columns: list[Column], best: bool) -> list[str]:
    """Return what the shown intervals are of, and what bold means."""
    keys = [column.key for column in columns]
    kinds = {
        signed: dict.fromkeys(
            row.intervals[key].of
            for section in sections
            if section.signed is signed
            for row in section.rows
            for key in keys
            if key in row.intervals
        )
        for signed in (False, True)
    }
    notes = [f"[low, high] of a value: {kind or 'an interval that its evaluator gives'}." for kind in kinds[False]]
    notes += [f"[low, high] of a difference: {kind}." for kind in kinds[True]]
    return [*notes, ABOUT_BEST] if best else notes


def _closed(run: TableRow, floors: list[TableRow], teachers: list[TableRow], metrics: Mapping[str, Metric]) -> TableRow:
    """Return a run's share, for each metric, of the way from the best floor to the metric's `end`."""
    ways: dict[Key, tuple[float, float]] = {}
    for key in dict.fromkeys(key for floor in floors for key in floor.cells):
        metric = metrics.get(key[0], Metric(key[0]))
        best = min if metric.better == "lower" else max
        start = best(floor.cells[key] for floor in floors if key in floor.cells)
        ends = [row.cells[key] for row in teachers if key in row.cells] if metric.end == TEACHER else [metric.end]
        for end in ends:
            if isinstance(end, int | float) and (end < start if metric.better == "lower" else end > start):
                ways[key] = (start, end - start)
    return TableRow(run.name, run.kind, _combine(lambda value, way: (value - way[0]) / way[1], run.cells, ways))


def _combine(function: Callable[[float, Any], float], a: dict[Key, float], b: dict[Key, Any]) -> dict[Key, float]:
    return {key: function(a[key], b[key]) for key in a if key in b}


def groups(table: Table) -> list[tuple[str, list[int]]]:
    """Return each column group's name with the indices of its columns, which are neighbours."""
    return [
        (name, [i for i, _ in members])
        for name, members in groupby(enumerate(table.columns), key=lambda pair: pair[1].group)
    ]
