"""Results of an evaluation: rows of numbers, how their metrics read, and the file that stores both."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, SupportsFloat

from fmdistill.registry import UserError

Row = dict[str, Any]  # subject, metric, value; if known count, low, high, interval; every other key is a dimension
Key = tuple[str, tuple[tuple[str, Any], ...]]  # a metric and its dimensions, sorted by name
Judged = tuple[list[Row], dict[str, Any]]  # what an evaluator's `judge` returns: rows, and details for JSON

FORMAT = 2  # of a stored result
STUDENT, TEACHER = "student", "teacher"  # the subjects that are no floors
MEASURED = ("subject", "metric", "value", "low", "high", "interval", "count")
OWN = ("format", "protocol", "metrics", "dimensions", "rows", "of")  # what a stored result holds besides the details


@dataclass(frozen=True)
class Metric:
    """How a metric reads in a table, and which way is better.

    `heading` stands above its columns and `label` above the column of a row without dimensions. The values of the
    dimension `across` label the columns; other dimensions then join the heading. Without `across`, all label them.
    `percent` metrics are shares, shown times 100. `end` is where the way from the best floor ends: a number, or
    "teacher" for the teacher's own value. `help` is one sentence for the report.
    """

    heading: str
    label: str = "all"
    across: str | None = None
    percent: bool = False
    better: Literal["higher", "lower"] | None = None
    end: float | Literal["teacher"] | None = None
    shown: bool = True  # False if a table leaves the metric out
    help: str = ""


@dataclass(frozen=True)
class Result:
    """One protocol's rows; `metrics` and `dimensions` are the evaluator's statements of how they read, by name."""

    protocol: dict[str, Any]
    rows: list[Row]
    metrics: dict[str, Metric] = field(default_factory=dict)
    dimensions: dict[str, str] = field(default_factory=dict)

    def metric(self, name: str) -> Metric:
        """Return the statement of a metric; one that the evaluator does not state reads as it is named."""
        return self.metrics.get(name, Metric(name))

    def to_json(self) -> dict[str, Any]:
        """Return the result for its file."""
        metrics = {name: asdict(metric) for name, metric in self.metrics.items()}
        stated = {"protocol": self.protocol, "metrics": metrics, "dimensions": self.dimensions}
        return {"format": FORMAT, **stated, "rows": self.rows}


def row(subject: str, metric: str, value: SupportsFloat, count: int | None = None, **dimensions: Any) -> Row:
    """Return a row; a count or dimension that is None is left out."""
    rest = {"count": count, **dimensions}
    return {"subject": subject, "metric": metric, "value": float(value)} | {
        name: given for name, given in rest.items() if given is not None
    }


def key(row: Mapping[str, Any]) -> Key:
    """Return what tells a row from the others of its subject."""
    dimensions = {name: given for name, given in row.items() if name not in MEASURED}
    return row["metric"], tuple(sorted(dimensions.items()))


def value(rows: Iterable[Mapping[str, Any]], metric: str, subject: str = STUDENT, **dimensions: Any) -> float:
    """Return the value of the row with exactly these dimensions; KeyError if there is none."""
    wanted = key({"metric": metric, **dimensions})
    for one in rows:
        if one["subject"] == subject and key(one) == wanted:
            return one["value"]
    raise KeyError(f"{subject}, {shown(wanted)}")


def label(name: str, given: Any) -> str:
    """Return how one dimension reads: a text as it is, anything else with its name."""
    return given if isinstance(given, str) else f"{name}={given}"


def shown(key: Key) -> str:
    """Return a metric and its dimensions as one text, such as "miou, 16x16, photos"."""
    return ", ".join([key[0], *(label(*pair) for pair in key[1])])


def line(row: Mapping[str, Any]) -> str:
    """Return a row as one text for a log."""
    return f"{row['subject']} {shown(key(row))} {row['value']:.4f}"


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows for a terminal, one a line, their subjects and metrics aligned."""
    names = [(str(one["subject"]), shown(key(one))) for one in rows]
    widths = [max((len(name[place]) for name in names), default=0) for place in (0, 1)]
    return "\n".join(
        f"{subject:{widths[0]}}  {metric:{widths[1]}}  {one['value']:.4f}{_beside(one)}"
        for one, (subject, metric) in zip(rows, names, strict=True)
    )


def check(judged: Any, name: str) -> Judged:
    """Return what the evaluator `name` gave. UserError unless it is rows, each told from the others, and details."""
    where = f"evaluator {name}: judge"
    if not (isinstance(judged, tuple) and len(judged) == 2 and isinstance(judged[1], dict)):
        raise UserError(f"{where} returned {type(judged).__name__}; expected (rows, details), a list and a dict")
    known: set[tuple[str, Key]] = set()
    for one in (rows := list(judged[0])):
        if not isinstance(one, dict) or not _is_row(one):
            raise UserError(f"{where} returned the row {one!r}; a row has subject, metric and a number as value")
        if (place := (one["subject"], key(one))) in known:
            raise UserError(f"{where} returned two rows of {line(one)}; tell them apart by a dimension's key")
        known.add(place)
    if clash := set(OWN) & judged[1].keys():
        raise UserError(f"{where} returned details named {', '.join(sorted(clash))}, as the file's own; rename them")
    return rows, judged[1]


def read(path: Path) -> Result | None:
    """Return the result stored at `path`; None if the file holds something else, such as masks.

    UserError for a file that is not JSON, or a result of another format.
    """
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); run `fmdistill evaluate` again") from error
    if not isinstance(stored, dict) or "protocol" not in stored:
        return None
    if stored.get("format") != FORMAT:
        raise UserError(f"{path}: a result of another version of fmdistill; run `fmdistill evaluate` again")
    try:
        metrics = {name: Metric(**stated) for name, stated in stored["metrics"].items()}
        return Result(stored["protocol"], stored["rows"], metrics, stored["dimensions"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a result of fmdistill ({error}); run `fmdistill evaluate` again") from error


def is_number(given: object) -> bool:
    """Return whether a row's value is a number."""
    return isinstance(given, int | float) and not isinstance(given, bool)


def _is_row(one: Mapping[str, Any]) -> bool:
    texts = all(isinstance(one.get(name), str) for name in ("subject", "metric"))
    return texts and is_number(one.get("value"))


def _beside(one: Mapping[str, Any]) -> str:
    interval = f"  [{one['low']:.4f}, {one['high']:.4f}]" if {"low", "high"} <= one.keys() else ""
    return interval + (f"  n={one['count']}" if "count" in one else "")
