"""Log lines and progress bars on the terminal, and rows of metrics in .jsonl files."""

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from fmdistill.files import naming, write_whole
from fmdistill.registry import UserError

log = logging.getLogger("fmdistill")

QUIET_INTERVAL = 10.0  # seconds between progress lines if stderr is not a terminal


class _TqdmHandler(logging.Handler):
    """Writes log lines through tqdm, which prints them above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _Lines:
    """Writes each state of a tqdm bar as a line, for a stream that is not a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()


def setup(level: int = logging.INFO) -> None:
    """Send the logger "fmdistill" to stderr; processes other than the first log only warnings and errors."""
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    for old in [existing for existing in log.handlers if isinstance(existing, _TqdmHandler)]:
        log.removeHandler(old)
    log.addHandler(handler)
    log.setLevel(level if _first_process() else max(level, logging.WARNING))


def progress(
    iterable: Iterable[Any] | None = None,
    description: str = "",
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
) -> tqdm:
    """Return a progress bar with the time left; iterate over it, or call its `update(n)` and `close()`.

    In a notebook it is a widget, if ipywidgets is installed. Elsewhere, if stderr is not a terminal, it prints a line
    about every ten seconds, and its last state.
    """
    if (widget := _widget()) is not None:
        return widget(iterable, desc=description, total=total, initial=initial, unit=unit, disable=not _first_process())
    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        file=sys.stderr if terminal else _Lines(sys.stderr),  # type: ignore[arg-type]
        mininterval=0.5 if terminal else QUIET_INTERVAL,
        miniters=None if terminal else 1,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        disable=not _first_process(),
    )


class JsonLines:
    """Appends rows to a .jsonl file; a written row survives if the process is killed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")

    def truncate_after(self, step: int) -> None:
        """Remove the rows whose `step` is larger, and an incomplete last line, by an atomic replacement."""
        rows = [row for row in read_json_lines(self.path) if row.get("step", step) <= step]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl file, without an incomplete last line; [] if the file does not exist."""
    path = Path(path)
    lines = path.read_text().split("\n") if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not JSON: {line[:60]!r}; remove the line, or the file") from None
    return rows


def _widget() -> type[tqdm] | None:
    """Return tqdm's progress bar for notebooks; None outside of a notebook, or without ipywidgets."""
    if "ipykernel" not in sys.modules:
        return None
    from tqdm import notebook

    return None if getattr(notebook, "IProgress", None) is None else notebook.tqdm_notebook  # from ipywidgets


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
