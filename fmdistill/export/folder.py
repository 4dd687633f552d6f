"""Write an exported folder whole: complete under its own name, or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fmdistill.files import file_hash, temporary_name, write_whole
from fmdistill.predict import artefact
from fmdistill.registry import UserError


@contextmanager
def whole_folder(out: Path, marker: str, what: str) -> Iterator[Path]:
    """Lend a temporary folder for the files, and rename it to `out` if the block ends without an error.

    An earlier export at `out`, which has the file `marker`, is replaced. Raises UserError, before the block, if `out`
    is anything else; `what` names the export in the message.
    """
    check_place(out, marker, what)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(out)
    temporary.mkdir()
    try:
        yield temporary
        _put(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_place(out: Path, marker: str, what: str) -> None:
    """Raise a UserError if `out` exists and is neither empty nor an earlier export, which has the file `marker`."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / marker).is_file())):
        raise UserError(f"{out}: already exists and is not {what} export; choose another name for the folder")


def describe(
    folder: Path,
    *,
    kind: str,
    format: str,
    precision: str,
    model: Mapping[str, Any],
    check: Mapping[str, Any],
    source: Mapping[str, Any],
) -> None:
    """Write the JSON that describes all files of `folder`, last; the arguments are those of `Artefact`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    described = {
        "version": artefact.VERSION,
        "kind": kind,
        "format": format,
        "precision": precision,
        "files": {path.relative_to(folder).as_posix(): file_hash(path) for path in paths},
        "model": model,
        "check": check,
        "source": source,
    }
    plain = json.loads(json.dumps(described))  # as it will be read, tuples as lists
    write_whole(folder / artefact.NAME, json.dumps({**plain, "seal": artefact.seal(plain)}, indent=1) + "\n")


def _put(temporary: Path, out: Path) -> None:
    """Rename `temporary` to `out`; an earlier export is renamed first, deleted afterwards, and restored on failure."""
    if not out.exists():
        os.rename(temporary, out)
        return
    earlier = temporary_name(out)
    os.rename(out, earlier)
    try:
        os.rename(temporary, out)
    except BaseException:
        os.rename(earlier, out)
        raise
    shutil.rmtree(earlier)
