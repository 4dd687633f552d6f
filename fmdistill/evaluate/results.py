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

FORMAT = 2  # version of a stored result
STUDENT, TEACHER = "student", "teacher"  # every other subject is a floor
NOT_DIMENSIONS = ("subject", "metric", "value", "low", "high", "interval", "count")
PER_IMAGE = "per_image"  # the detail with the sums and counts of every image, see `intervals.Means.details`
RESERVED = ("format", "protocol", "metrics", "dimensions", "rows", "of")  # a stored result's keys besides the details


@dataclass(frozen=True)
class Metric:
    """How a metric is shown in a table, and which way is better.

    `heading` is the text above its columns, `label` that of the column of a row without dimensions. The values of the
    dimension `across` label the columns, and other dimensions then join the heading; without `across`, every dimension
    is in the label. `percent` metrics are shares, shown times 100. `end` is the value that counts as 100 % of the way
    from the best floor: a number, or "teacher" for the teacher's own value. `help` is one sentence for the report.
    """

    heading: str
    label: str = "all"
    across: str | None = None
    percent: bool = False
    better: Literal["higher", "lower"] | None = None
    end: float | Literal["teacher"] | None = None
    shown: bool = True  # False to leave the metric out of tables
    help: str = ""


@dataclass(frozen=True)
class Result:
    """The rows of one protocol, with the evaluator's descriptions of its metrics and dimensions by name."""

    protocol: dict[str, Any]
    rows: list[Row]
    metrics: dict[str, Metric] = field(default_factory=dict)
    dimensions: dict[str, str] = field(default_factory=dict)
    per_image: list[dict[str, Any]] = field(default_factory=list)  # `intervals.Means.details`, stored with the details

    def metric(self, name: str) -> Metric:
        """Return the description of a metric; a plain one with the metric's name if the evaluator has none."""
        return self.metrics.get(name, Metric(name))

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON for its file."""
        metrics = {name: asdict(metric) for name, metric in self.metrics.items()}
        described = {"protocol": self.protocol, "metrics": metrics, "dimensions": self.dimensions}
        return {"format": FORMAT, **described, "rows": self.rows}


def row(subject: str, metric: str, value: SupportsFloat, count: int | None = None, **dimensions: Any) -> Row:
    """Return a row without the count or any dimension that is None."""
    optional = {"count": count, **dimensions}
    return {"subject": subject, "metric": metric, "value": float(value)} | {
        name: entry for name, entry in optional.items() if entry is not None
    }


def key(row: Mapping[str, Any]) -> Key:
    """Return a row's metric and dimensions, which no other row of the same subject has."""
    dimensions = {name: entry for name, entry in row.items() if name not in NOT_DIMENSIONS}
    return row["metric"], tuple(sorted(dimensions.items()))


def value(rows: Iterable[Mapping[str, Any]], metric: str, subject: str = STUDENT, **dimensions: Any) -> float:
    """Return the value of the row with exactly these dimensions. Raises KeyError if there is no such row."""
    row_key = key({"metric": metric, **dimensions})
    for row in rows:
        if row["subject"] == subject and key(row) == row_key:
            return row["value"]
    raise KeyError(f"{subject}, {shown(row_key)}")


def label(name: str, value: Any) -> str:
    """Return a dimension as text: a string by itself, any other value with the dimension's name."""
    return value if isinstance(value, str) else f"{name}={value}"


def shown(key: Key) -> str:
    """Return a metric and its dimensions as text, such as "miou, 16x16, photos"."""
    return ", ".join([key[0], *(label(*pair) for pair in key[1])])


def line(row: Mapping[str, Any]) -> str:
    """Return a row as text for a log."""
    return f"{row['subject']} {shown(key(row))} {row['value']:.4f}"


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as text for a terminal, one row a line, with subjects and metrics aligned, and what intervals are."""
    names = [(str(row["subject"]), shown(key(row))) for row in rows]
    widths = [max((len(name[column]) for name in names), default=0) for column in (0, 1)]
    lines = [
        f"{subject:{widths[0]}}  {metric:{widths[1]}}  {row['value']:.4f}{_interval_and_count(row)}"
        for row, (subject, metric) in zip(rows, names, strict=True)
    ]
    kinds = dict.fromkeys(row["interval"] for row in rows if "interval" in row)
    return "\n".join([*lines, *(f"[low, high]: {kind}" for kind in kinds)])


def check(judged: Any, name: str) -> Judged:
    """Check what the evaluator `name` returned. Raises UserError unless it is distinct rows, and details."""
    where = f"evaluator {name}: judge"
    if not (isinstance(judged, tuple) and len(judged) == 2 and isinstance(judged[1], dict)):
        raise UserError(f"{where} returned {type(judged).__name__}; expected (rows, details), a list and a dict")
    known: set[tuple[str, Key]] = set()
    for row in (rows := list(judged[0])):
        if not isinstance(row, dict) or not _is_row(row):
            raise UserError(f"{where} returned the row {row!r}; a row has subject, metric and a number as value")
        if (identity := (row["subject"], key(row))) in known:
            raise UserError(f"{where} returned two rows of {line(row)}; give one of them another dimension")
        known.add(identity)
    if clash := set(RESERVED) & judged[1].keys():
        raise UserError(
            f"{where} returned details named {', '.join(sorted(clash))}, which the result's file uses itself; "
            f"rename them"
        )
    return rows, judged[1]


def read(path: Path) -> Result | None:
    """Read the result stored at `path`; return None if the file holds something else, such as masks.

    Raises UserError if the file is not JSON or its result has another format.
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
        metrics = {name: Metric(**fields) for name, fields in stored["metrics"].items()}
        return Result(stored["protocol"], stored["rows"], metrics, stored["dimensions"], stored.get(PER_IMAGE, []))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a result of fmdistill ({error}); run `fmdistill evaluate` again") from error


def is_number(value: object) -> bool:
    """Return whether a value is a number; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_row(row: Mapping[str, Any]) -> bool:
    named = all(isinstance(row.get(name), str) for name in ("subject", "metric"))
    return named and is_number(row.get("value"))


def _interval_and_count(row: Mapping[str, Any]) -> str:
    interval = f"  [{row['low']:.4f}, {row['high']:.4f}]" if {"low", "high"} <= row.keys() else ""
    return interval + (f"  n={row['count']}" if "count" in row else "")
