"""Read runs, their results and published tables into rows of a table."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fmdistill import recipe as recipes
from fmdistill.evaluate import results
from fmdistill.evaluate.intervals import Entry, entry_key
from fmdistill.evaluate.results import STUDENT, TEACHER, Key, Result
from fmdistill.logs import read_json_lines
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.stages import saved_stages

Kind = Literal["run", "teacher", "floor", "published"]


@dataclass(frozen=True)
class Run:
    """A run read from its folder: recipe, training log, and results by the name of the protocol's file.

    If the run has stages, `stage` is the last one's name, and `earlier` are the runs of those before by their names.
    """

    name: str
    folder: Path
    recipe: Recipe
    log: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, Result] = field(default_factory=dict)
    stage: str = ""
    earlier: "dict[str, Run]" = field(default_factory=dict)

    @property
    def stages(self) -> "dict[str, Run]":
        """The runs of all its stages by name, in their order; itself under "" if it has none."""
        return {**self.earlier, self.stage: self}

    def curves(self) -> dict[str, list[dict[str, Any]]]:
        """Return the log by the run's name; of several stages, each one's log, its steps counted on from the last."""
        drawn, done = {}, 0
        for stage, run in self.stages.items():
            rows = [row for row in run.log if "step" in row]
            name = f"{self.name}, {stage}" if stage else self.name
            drawn[name] = [{**row, "step": row["step"] + done} for row in rows]
            done += max((row["step"] for row in rows), default=0)
        return drawn


@dataclass(frozen=True)
class Interval:
    """The ends of a value's interval, and what it is, such as "95 % bootstrap over images"."""

    low: float
    high: float
    of: str = ""


@dataclass(frozen=True)
class TableRow:
    """A row of a table: the values of one subject by metric and dimensions, with their intervals.

    `per_image` are the stored sums of the images, for the intervals of differences (`intervals.differences`).
    """

    name: str
    kind: Kind
    cells: dict[Key, float]
    intervals: dict[Key, Interval] = field(default_factory=dict)
    per_image: dict[Key, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A paper's table, with its citation as `source` and a description of the experiment as `setting`.

    The table is shown beside the results of a protocol that has the name and all settings of `protocol`.
    """

    source: str
    setting: str
    protocol: dict[str, Any]
    rows: list[TableRow]


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read the runs of `folders`; name each by the end of its path, as long as needed for distinct names."""
    paths = list(dict.fromkeys(Path(folder) for folder in folders))
    if not paths:
        raise UserError("report: no run is named; give one or more run folders")
    depth = 1
    while len({p.resolve().parts[-depth:] for p in paths}) < len({p.resolve() for p in paths}):
        depth += 1
    return [_read_run("/".join(path.resolve().parts[-depth:]), path) for path in paths]


def rows(runs: list[Run], evaluation: str) -> list[TableRow]:
    """Return one row per run and subject of an evaluation; a teacher or floor that runs share appears once."""
    table_rows: list[TableRow] = []
    for run in runs:
        if evaluation not in run.evaluations:
            continue
        result = run.evaluations[evaluation]
        subjects, entries = _by_subject(result.rows), _entries(result)
        for subject, stored in subjects.items():
            rest = _cells(stored), _intervals(stored), entries.get(subject, {})
            if subject == STUDENT:
                table_rows.append(TableRow(run.name, "run", *rest))
            elif STUDENT not in subjects:
                table_rows.append(TableRow(f"{run.name}: {subject}", "run", *rest))
            elif not any(row.kind != "run" and row.cells == rest[0] for row in table_rows):
                name_taken = any(row.name == subject for row in table_rows)
                kind = "teacher" if subject == TEACHER else "floor"
                table_rows.append(TableRow(f"{subject} ({run.name})" if name_taken else subject, kind, *rest))
    return sorted(table_rows, key=lambda row: row.kind != "run")


def published(protocol: dict[str, Any]) -> list[Published]:
    """Return the papers' tables for a protocol, from eval/published in the working folder, then in the package."""
    package = Path(recipes.__file__).parent
    files: dict[str, Path] = {}
    for base in (Path.cwd(), package, package.parent):
        for path in sorted((base / "eval" / "published").glob("*.yaml")):
            files.setdefault(path.name, path)
    tables = [read_published(path) for _, path in sorted(files.items())]
    return [table for table in tables if table.protocol.items() <= protocol.items()]


def read_published(path: Path) -> Published:
    """Read one paper's table, converting percent to fractions. Raises UserError if the file is malformed."""
    settings = recipes.read_yaml(path)
    missing = {"source", "setting", "protocol", "unit", "rows"} - settings.keys()
    kinds = (("protocol", dict), ("rows", list))
    wrong = missing or [name for name, kind in kinds if not isinstance(settings[name], kind)]
    if wrong or settings["unit"] not in ("percent", "fraction"):
        raise UserError(
            f"{path}: needs source, setting, protocol (a mapping), rows (a list) and unit (percent or fraction)"
        )
    scale = 100.0 if settings["unit"] == "percent" else 1.0
    subjects = _by_subject([_published_row(path, row, scale) for row in settings["rows"]])
    table_rows = [TableRow(name, "published", _cells(stored)) for name, stored in subjects.items()]
    return Published(settings["source"], settings["setting"], settings["protocol"], table_rows)


def _published_row(path: Path, row: Any, scale: float) -> results.Row:
    named = isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("subject", "metric"))
    if not named or not results.is_number(row.get("value")):
        raise UserError(f"{path}: rows: expected {{subject: NAME, metric: NAME, value: NUMBER}}, got {row!r}")
    return {**row, "value": row["value"] / scale}


def _read_run(name: str, folder: Path) -> Run:
    recipe = recipes.load_saved(folder, ["trust=true"])  # reading a recipe imports nothing
    stored = {path.stem: results.read(path) for path in sorted((folder / "evaluation").glob("*.json"))}
    evaluations = {stem: result for stem, result in stored.items() if result is not None}
    log, whole = read_json_lines(folder / "metrics.jsonl"), saved_stages(folder)
    if whole is None or whole.stages is None:
        return Run(name, folder, recipe, log, evaluations)
    *before, last = whole.stages
    kept = [stage for stage in before if (folder / stage / recipes.SAVED).is_file()]  # the others were deleted
    earlier = {stage: _read_run(f"{name}/{stage}", folder / stage) for stage in kept}
    return Run(name, folder, recipe, log, evaluations, last, earlier)


def _by_subject(stored: Iterable[results.Row]) -> dict[str, list[results.Row]]:
    subjects: dict[str, list[results.Row]] = {}
    for row in stored:
        subjects.setdefault(row["subject"], []).append(row)
    return subjects


def _cells(stored: Iterable[results.Row]) -> dict[Key, float]:
    return {results.key(row): row["value"] for row in stored}


def _intervals(stored: Iterable[results.Row]) -> dict[Key, Interval]:
    return {
        results.key(row): Interval(row["low"], row["high"], row.get("interval", ""))
        for row in stored
        if {"low", "high"} <= row.keys()
    }


def _entries(result: Result) -> dict[str, dict[Key, Entry]]:
    """Return the stored sums of the images by subject and key."""
    subjects: dict[str, dict[Key, Entry]] = {}
    for entry in result.per_image:
        subjects.setdefault(entry["subject"], {})[entry_key(entry)] = entry
    return subjects
