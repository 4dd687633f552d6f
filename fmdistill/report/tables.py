"""Build a table from rows, and format it as aligned text for a terminal or as HTML for the page."""

import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from fmdistill.evaluate import results
from fmdistill.evaluate.results import TEACHER, Key, Metric
from fmdistill.report.rows import Published, TableRow


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
    """Columns, and sections of rows; a cell is empty if its row lacks the column's metric."""

    columns: list[Column]
    sections: list[Section]


def build(rows: list[TableRow], metrics: Mapping[str, Metric], papers: list[Published] | None = None) -> Table:
    """Build the table of runs, their differences, teachers, floors, shares of the gap closed, and papers' rows.

    `metrics` are the evaluator's descriptions by name; a metric without one is shown under its name, unscaled.
    """
    runs, teachers, floors = ([r for r in rows if r.kind == kind] for kind in ("run", "teacher", "floor"))
    columns = _columns(runs, metrics)
    sections = [Section("Runs", "run", runs)]
    if len(runs) > 1:
        sections.append(Section(f"Difference to {runs[0].name}", "difference", _differences(runs), signed=True))
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
            differences = _differences(shown)
            sections.append(Section(f"Published difference to {shown[0].name}", "published", differences, signed=True))
    return Table(columns, sections)


def plain(table: Table) -> str:
    """Format the table as aligned text, with the column groups on a line above their columns."""
    bodies = [[[row.name, *_cells(row, table, section)] for row in section.rows] for section in table.sections]
    cells = [["", *(column.label for column in table.columns)], *(line for body in bodies for line in body)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    top = " " * widths[0]
    for name, members in _groups(table):
        needed = sum(widths[i + 1] + 2 for i in members)
        widths[members[-1] + 1] += max(0, len(name) + 2 - needed)
        top += f"  {name:^{max(len(name), needed - 2)}}"
    lines = [top.rstrip(), _aligned(cells[0], widths)]
    for section, body in zip(table.sections, bodies, strict=True):
        lines += ["", *textwrap.wrap(section.heading, 100), *(_aligned(line, widths) for line in body)]
    return "\n".join(lines)


def html(table: Table) -> str:
    """Format the table as HTML; each section's kind is its CSS class."""
    groups = ((name, len(members)) for name, members in _groups(table))
    top = "".join(f'<th colspan="{span}" scope="colgroup">{escape(name)}</th>' for name, span in groups)
    labels = "".join(f'<th scope="col">{escape(column.label)}</th>' for column in table.columns)
    bodies = "".join(_body(section, table) for section in table.sections)
    head = f'<thead><tr><th rowspan="2"></th>{top}</tr><tr>{labels}</tr></thead>'
    return f'<div class="scroll"><table>{head}{bodies}</table></div>'


def _body(section: Section, table: Table) -> str:
    span = len(table.columns) + 1
    heading = f'<tr class="heading"><th colspan="{span}"><span>{escape(section.heading)}</span></th></tr>'
    lines = [
        f'<tr><th scope="row">{escape(row.name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row, table, section))
        + "</tr>"
        for row in section.rows
    ]
    return f'<tbody class="{section.kind}">{heading}{"".join(lines)}</tbody>'


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


def _differences(rows: list[TableRow]) -> list[TableRow]:
    return [
        TableRow(f"{row.name} − {rows[0].name}", row.kind, _combine(lambda a, b: a - b, row.cells, rows[0].cells))
        for row in rows[1:]
    ]


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


def _cells(row: TableRow, table: Table, section: Section) -> list[str]:
    shares = section.kind == "closed"  # for every metric
    return [_number(row.cells.get(column.key), column.percent or shares, section.signed) for column in table.columns]


def _number(value: float | None, percent: bool, signed: bool) -> str:
    if value is None:
        return ""
    shown = f"{100 * value:.2f}" if percent else f"{value:.4f}"
    return ("+" if signed and not shown.startswith("-") else "") + shown.replace("-", "−")


def _groups(table: Table) -> list[tuple[str, list[int]]]:
    """Return each column group's name with the indices of its columns, which are neighbours."""
    return [
        (name, [i for i, _ in members])
        for name, members in groupby(enumerate(table.columns), key=lambda pair: pair[1].group)
    ]


def _aligned(line: list[str], widths: list[int]) -> str:
    return "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
