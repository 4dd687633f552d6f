"""Read runs and published tables into rows of numbers."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fmdistill import recipe as recipes
from fmdistill.logs import read_json_lines
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

# The subjects of an evaluation's metrics: the run's own network, its teacher where that is judged too, and floors.
STUDENT, TEACHER = "student", "teacher"
Kind = Literal["run", "teacher", "floor", "published"]


@dataclass(frozen=True)
class Run:
    """A run as it lies on disk; evaluations by their file's stem, metrics as the evaluator named them.

    `protocols` holds by stem the settings of the protocol that judged: one may have several files, such as a short one.
    """

    name: str
    folder: Path
    recipe: Recipe
    log: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of a table: metrics without their subject, such as {"16x16/photos/miou": 0.74}."""

    name: str
    kind: Kind
    metrics: dict[str, float]


@dataclass(frozen=True)
class Published:
    """A paper's table; `source` says whose, `setting` what differs from ours.

    `protocol` holds the name and the settings that a protocol of ours must share for its figures to stand beside these.
    """

    source: str
    setting: str
    protocol: dict[str, Any]
    rows: list[Row]


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Return the runs of `folders`, each named by as much of its path as tells it from the others."""
    paths = list(dict.fromkeys(Path(folder) for folder in folders))
    if not paths:
        raise UserError("report: names no run; give one or more run folders")
    depth = 1
    while len({p.resolve().parts[-depth:] for p in paths}) < len({p.resolve() for p in paths}):
        depth += 1
    return [_read_run("/".join(path.resolve().parts[-depth:]), path) for path in paths]


def rows(runs: list[Run], evaluation: str) -> list[Row]:
    """Return one row per run and subject of an evaluation; a teacher or floor that the runs share is listed once."""
    found: list[Row] = []
    for run in runs:
        subjects = _by_subject(run.evaluations.get(evaluation, {}))
        for subject, metrics in subjects.items():
            if subject == STUDENT:
                found.append(Row(run.name, "run", metrics))
            elif STUDENT not in subjects:
                found.append(Row(f"{run.name}: {subject}", "run", metrics))
            elif not any(row.kind != "run" and row.metrics == metrics for row in found):
                known = any(row.name == subject for row in found)
                kind = "teacher" if subject == TEACHER else "floor"
                found.append(Row(f"{subject} ({run.name})" if known else subject, kind, metrics))
    return sorted(found, key=lambda row: row.kind != "run")


def published(protocol: dict[str, Any]) -> list[Published]:
    """Return the papers' tables that fit a protocol, from eval/published of the working folder, then of the package."""
    package = Path(recipes.__file__).parent
    files: dict[str, Path] = {}
    for base in (Path.cwd(), package, package.parent):
        for path in sorted((base / "eval" / "published").glob("*.yaml")):
            files.setdefault(path.name, path)
    tables = [read_published(path) for _, path in sorted(files.items())]
    return [table for table in tables if table.protocol.items() <= protocol.items()]


def read_published(path: Path) -> Published:
    """Return one paper's table; its numbers become fractions where it prints percent."""
    settings = recipes.read_yaml(path)
    missing = {"source", "setting", "protocol", "unit", "rows"} - settings.keys()
    if missing or settings["unit"] not in ("percent", "fraction") or not isinstance(settings["protocol"], dict):
        raise UserError(f"{path}: needs source, setting, protocol (a mapping), rows and unit (percent or fraction)")
    scale = 100.0 if settings["unit"] == "percent" else 1.0
    found = [
        Row(name, "published", {k: v / scale for k, v in metrics.items()}) for name, metrics in settings["rows"].items()
    ]
    return Published(settings["source"], settings["setting"], settings["protocol"], found)


def _read_run(name: str, folder: Path) -> Run:
    recipe = recipes.load_saved(folder, ["trust=true"])  # only read here, nothing is imported
    evaluations, protocols = {}, {}
    for path in sorted((folder / "evaluation").glob("*.json")):
        found = _read_json(path)
        if "metrics" in found:
            evaluations[path.stem] = found["metrics"]
            protocols[path.stem] = found.get("protocol", {})
    return Run(name, folder, recipe, read_json_lines(folder / "metrics.jsonl"), evaluations, protocols)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); run `fmdistill evaluate` again") from error
    return found if isinstance(found, dict) else {}


def _by_subject(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    subjects: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        subject, slash, rest = name.partition("/")
        subjects.setdefault(subject if slash else STUDENT, {})[rest or name] = float(value)
    return subjects
