"""The report stage: runs -> one self-contained HTML page of tables, curves and pictures, or the tables as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fmdistill.evaluate.results import Result
from fmdistill.files import check_folder, write_whole
from fmdistill.logs import log
from fmdistill.registry import UserError
from fmdistill.report import bars, formats, page, pictures, plots, rows, tables
from fmdistill.report.rows import Run, TableRow
from fmdistill.report.tables import Table

OPEN_BARS = 6  # figures of bars that a page shows; the others are opened by a click

ONE_SEED = (
    "One seed is not a comparison: two seeds of one recipe can differ as much as these rows do, so a difference counts "
    "only if it holds over several seeds. Intervals are over images and do not cover the difference between seeds."
)
ABOUT_PUBLISHED = (
    "Shaded rows are a paper's, with another teacher, other images and a larger student: compare differences with "
    "them, not values."
)
ABOUT_CURVES = (
    "Each panel is one logged quantity, with a line per run. A weighted and an unweighted loss are different "
    "quantities: compare runs by the table, and a run's curve only with itself. The effective sample size is "
    "(Σw)²/(N Σw²); it is 1 if all patches or images have the same weight. An axis is logarithmic if its loss or norm "
    "spans more than a factor of five."
)


ABOUT_STAGES = (
    "The stages of a run follow each other, each with a line of its own; the results above are those of the last one."
)


@dataclass(frozen=True)
class Judged:
    """The runs' results by one protocol: its name, one of the results, which describes the metrics, rows and table."""

    protocol: str
    result: Result
    rows: list[TableRow]
    table: Table


def run(runs: list[str], out: str, trust: bool = False, images: tuple[str, ...] = ()) -> Path:
    """Write a report on the run folders to `out`/index.html and return that path.

    Beside it, each protocol's table is written as PROTOCOL.md, .tex and .csv. Pictures need the runs' students; a
    student whose code is outside fmdistill is imported only with `trust`. `images` are files, folders or keys of
    validation images whose masks and weights are shown; files need the runs' teacher. UserError if one is missing.
    """
    check_folder(out, "the report")
    loaded = rows.read_runs(runs)
    judged = _judged(loaded)
    first, last = _pictures(loaded, trust, images)
    parts = [_titles(loaded), *first, *_results(judged), *_curves(loaded), *last]
    path = Path(out).expanduser() / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    for entry in judged:
        for ending, format_table in formats.FILES.values():
            write_whole(path.with_name(f"{entry.protocol}.{ending}"), format_table(entry.table))
    write_whole(path, page.page("Distillation report", parts))
    return path


def text(runs: list[str]) -> str:
    """Return the tables of the run folders as text for a terminal, with a warning about single seeds."""
    texts = [f"{entry.protocol}\n{formats.plain(entry.table)}" for entry in _judged(rows.read_runs(runs))]
    return "\n\n".join([*(texts or ["no evaluation yet: run `fmdistill evaluate PROTOCOL RUN`"]), ONE_SEED])


def _judged(runs: list[Run]) -> list[Judged]:
    judged = []
    for stem, result in {stem: result for run in runs for stem, result in run.evaluations.items()}.items():
        table_rows = rows.rows(runs, stem)
        table = tables.build(table_rows, result.metrics, rows.published(result.protocol))
        judged.append(Judged(stem, result, table_rows, table))
    return judged


def _titles(runs: list[Run]) -> str:
    return page.definitions(
        (run.name, " · ".join([run.recipe.title or "untitled recipe", f"seed {run.recipe.seed}", *_stages(run)]))
        for run in runs
    )


def _stages(run: Run) -> list[str]:
    return [f"stages {', '.join(run.stages)}"] if run.stage else []


def _results(judged: list[Judged]) -> list[str]:
    parts = [page.heading("Results"), page.paragraph(ONE_SEED, "notice")]
    if not judged:
        text = "None of these runs has been evaluated yet: run fmdistill evaluate PROTOCOL RUN."
        return [*parts, page.paragraph(text)]
    for entry in judged:
        files = {name: f"{entry.protocol}.{ending}" for name, (ending, _) in formats.FILES.items()}
        parts += [page.heading(f"Protocol {entry.protocol}", 3), formats.html(entry.table)]
        parts += [page.paragraph(" ".join(entry.table.notes))] if entry.table.notes else []
        parts += [page.links("This table as", files), *_bars(entry)]
    sentences = [text for entry in judged for text in _explanations(entry.result, entry.table)]
    if any(section.kind == "published" for entry in judged for section in entry.table.sections):
        sentences.append(ABOUT_PUBLISHED)
    return [*parts, page.paragraph(" ".join(dict.fromkeys(sentences)))]


def _bars(entry: Judged) -> list[str]:
    panels = bars.gather(entry.rows, entry.result.metrics)
    figures = [page.figure(plots.bars_figure(panel), "", panel.title) for panel in panels]
    shown, hidden = figures[:OPEN_BARS], figures[OPEN_BARS:]
    kinds = dict.fromkeys(kind for panel in panels for kind in panel.kinds)
    parts = [page.grid(shown)] if shown else []
    parts += [page.details(f"{len(hidden)} more by parts of the images", [page.grid(hidden)])] if hidden else []
    return [*parts, page.paragraph(f"Lines on the bars: {', '.join(kinds)}.")] if kinds else parts


def _explanations(result: Result, table: Table) -> list[str]:
    """Return the evaluator's explanations of the metrics and dimensions that the table shows."""
    metrics = dict.fromkeys(column.key[0] for column in table.columns)
    dimensions = dict.fromkeys(name for column in table.columns for name, _ in column.key[1])
    texts = [*(result.metric(name).help for name in metrics), *(result.dimensions.get(name, "") for name in dimensions)]
    return [text for text in texts if text]


def _curves(runs: list[Run]) -> list[str]:
    pictures = plots.curve_figures({name: log for run in runs for name, log in run.curves().items()})
    if not pictures:
        return []
    staged = any(run.stage for run in runs)
    lines = "one line per run and stage" if staged else "one line per run"
    figures = [page.figure(picture, "", f"{key} by step, {lines}") for key, picture in pictures.items()]
    about = f"{ABOUT_CURVES} {ABOUT_STAGES}" if staged else ABOUT_CURVES
    return [page.heading("Training"), page.paragraph(about), page.grid(figures)]


def _pictures(runs: list[Run], trust: bool, images: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return `pictures.gather`, or why there are no pictures, which is an error only if images were named."""
    try:
        return pictures.gather(runs, trust, images)
    except UserError as error:
        if images:
            raise
        log.warning("report: no pictures: %s", error)
        return [], [page.heading("Pictures"), page.paragraph(f"No pictures: {error}", "notice")]
