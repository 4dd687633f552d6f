"""Format a table as aligned text for a terminal, and as HTML, Markdown, LaTeX and CSV."""

import csv
import io
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from html import escape

from fmdistill.report.rows import TableRow
from fmdistill.report.tables import Column, Section, Table, groups

WIDTH = 110  # characters of a line in a terminal
LATEX = {  # characters that mean something else in LaTeX, or that its default fonts lack
    **{character: f"\\{character}" for character in "#$%&_{}"},
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "×": r"$\times$",
    "−": "$-$",
    "·": r"$\cdot$",
    "–": "--",
}


@dataclass(frozen=True)
class Cell:
    """A cell as text: its value, its interval, such as "[68.91, 71.20]", and whether its run is the best."""

    value: str
    interval: str
    best: bool

    @property
    def text(self) -> str:
        """Return value and interval in one line."""
        return f"{self.value} {self.interval}".strip()


def cells(row: TableRow, table: Table, section: Section) -> list[Cell]:
    """Return a row's cells, one for each column; empty ones if it has no value."""
    return [_cell(row, column, section, table.best.get(column.key)) for column in table.columns]


def plain(table: Table) -> str:
    """Format the table as aligned text, with the column groups above their columns; wide tables as several blocks."""
    return "\n\n".join([*map(_block, blocks(table)), *table.notes])


def blocks(table: Table) -> list[Table]:
    """Return the table cut into tables of at most WIDTH characters, each with the sections that have values in it."""
    names = max(len(row.name) for section in table.sections for row in section.rows)
    parts: list[list[Column]] = [[]]
    used = names
    for column in table.columns:
        narrow = replace(table, columns=[column])
        texts = [cells(row, narrow, section)[0].text for section in table.sections for row in section.rows]
        needed = 2 + max(len(column.label), *map(len, texts))
        if used + needed > WIDTH and parts[-1]:
            parts.append([])
            used = names
        parts[-1].append(column)
        used += needed
    return [replace(table, columns=columns, sections=_with_values(table.sections, columns)) for columns in parts]


def html(table: Table) -> str:
    """Format the table as HTML; each section's kind is its CSS class."""
    spans = ((escape(name), len(members)) for name, members in groups(table))
    top = "".join(f'<th colspan="{span}" scope="colgroup">{name}</th>' for name, span in spans)
    labels = "".join(f'<th scope="col">{escape(column.label)}</th>' for column in table.columns)
    bodies = "".join(_html_body(section, table) for section in table.sections)
    head = f'<thead><tr><th rowspan="2"></th>{top}</tr><tr>{labels}</tr></thead>'
    return f'<div class="scroll"><table>{head}{bodies}</table></div>'


def markdown(table: Table) -> str:
    """Format the table as Markdown, a table for each section and block; the best run's values are bold."""
    parts = []
    for block in blocks(table):
        for section in block.sections:
            heads = ["", *(_full_label(column) for column in block.columns)]
            lines = [heads, ["---", *("---:" for _ in block.columns)]]
            lines += [[row.name, *map(_markdown_cell, cells(row, block, section))] for row in section.rows]
            rows = ("| " + " | ".join(text.replace("|", r"\|") for text in line) + " |" for line in lines)
            parts.append(f"**{section.heading}**\n\n" + "\n".join(rows))
    return "\n\n".join([*parts, *table.notes]) + "\n"


def latex(table: Table) -> str:
    """Format the table as LaTeX for the package booktabs, a tabular for each block; the best run's values are bold."""
    notes = ["\\usepackage{booktabs} in the preamble", *table.notes]
    return "\n".join([*(f"% {note}" for note in notes), "\n\n".join(map(_tabular, blocks(table)))]) + "\n"


def as_csv(table: Table) -> str:
    """Format the table as CSV with a line for each value, unscaled; its dimensions are columns of their own."""
    dimensions = list(dict.fromkeys(name for column in table.columns for name, _ in column.key[1]))
    names = ["section", "name", "metric", *dimensions, "value", "low", "high", "interval"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for section in table.sections:
        for row in section.rows:
            for metric, pairs in (column.key for column in table.columns if column.key in row.cells):
                interval = row.intervals.get((metric, pairs))
                ends = ["", "", ""] if interval is None else [interval.low, interval.high, interval.of]
                stated = [dict(pairs).get(name, "") for name in dimensions]
                writer.writerow([section.kind, row.name, metric, *stated, row.cells[metric, pairs], *ends])
    return file.getvalue()


FILES = {"Markdown": ("md", markdown), "LaTeX": ("tex", latex), "CSV": ("csv", as_csv)}


def _cell(row: TableRow, column: Column, section: Section, best: str | None) -> Cell:
    percent = column.percent or section.kind == "closed"  # shares, for every metric
    interval = row.intervals.get(column.key)
    ends = () if interval is None else (interval.low, interval.high)
    shown = ", ".join(_number(end, percent, section.signed) for end in ends)
    value = _number(row.cells.get(column.key), percent, section.signed)
    return Cell(value, f"[{shown}]" if shown else "", section.kind == "run" and row.name == best)


def _with_values(sections: Iterable[Section], columns: Iterable[Column]) -> list[Section]:
    keys = {column.key for column in columns}
    return [section for section in sections if any(row.cells.keys() & keys for row in section.rows)]


def _number(value: float | None, percent: bool, signed: bool) -> str:
    if value is None:
        return ""
    shown = f"{100 * value:.2f}" if percent else f"{value:.4f}"
    return ("+" if signed and not shown.startswith("-") else "") + shown.replace("-", "−")


def _block(table: Table) -> str:
    bodies = [
        (section, [[row.name, *(cell.text for cell in cells(row, table, section))] for row in section.rows])
        for section in table.sections
    ]
    lines = [["", *(column.label for column in table.columns)], *(line for _, body in bodies for line in body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    top = " " * widths[0]
    for name, members in groups(table):
        needed = sum(widths[i + 1] + 2 for i in members)
        widths[members[-1] + 1] += max(0, len(name) + 2 - needed)
        top += f"  {name:^{max(len(name), needed - 2)}}"
    text = [top.rstrip(), _aligned(lines[0], widths)]
    for section, body in bodies:
        text += ["", *textwrap.wrap(section.heading, 100), *(_aligned(line, widths) for line in body)]
    return "\n".join(text)


def _aligned(line: list[str], widths: list[int]) -> str:
    return "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])


def _html_body(section: Section, table: Table) -> str:
    span = len(table.columns) + 1
    heading = f'<tr class="heading"><th colspan="{span}"><span>{escape(section.heading)}</span></th></tr>'
    lines = [
        f'<tr><th scope="row">{escape(row.name)}</th>' + "".join(map(_html_cell, cells(row, table, section))) + "</tr>"
        for row in section.rows
    ]
    return f'<tbody class="{section.kind}">{heading}{"".join(lines)}</tbody>'


def _html_cell(cell: Cell) -> str:
    value = f"<strong>{escape(cell.value)}</strong>" if cell.best else escape(cell.value)
    return f"<td>{value}<small>{escape(cell.interval)}</small></td>" if cell.interval else f"<td>{value}</td>"


def _markdown_cell(cell: Cell) -> str:
    return f"**{cell.value}** {cell.interval}".strip() if cell.best else cell.text


def _full_label(column: Column) -> str:
    return column.group if column.label == "all" else f"{column.group}: {column.label}"


def _tabular(table: Table) -> str:
    width = len(table.columns) + 1
    top = ["", *(rf"\multicolumn{{{len(members)}}}{{c}}{{{_tex(name)}}}" for name, members in groups(table))]
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        _tex_row(top),
        "".join(rf"\cmidrule(lr){{{members[0] + 2}-{members[-1] + 2}}}" for _, members in groups(table)),
        _tex_row(["", *(_tex(column.label) for column in table.columns)]),
    ]
    for section in table.sections:
        headings = textwrap.wrap(section.heading, 80)
        lines += [r"\midrule", *(_tex_row([rf"\multicolumn{{{width}}}{{l}}{{\emph{{{_tex(h)}}}}}"]) for h in headings)]
        lines += [_tex_row([_tex(row.name), *map(_tex_cell, cells(row, table, section))]) for row in section.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _tex(text: str) -> str:
    return re.sub(".", lambda match: LATEX.get(match[0], match[0]), text)


def _tex_cell(cell: Cell) -> str:
    value = rf"\textbf{{{_tex(cell.value)}}}" if cell.best else _tex(cell.value)
    return rf"{value} {{\scriptsize {_tex(cell.interval)}}}" if cell.interval else value


def _tex_row(texts: Iterable[str]) -> str:
    return " & ".join(texts) + r" \\"
