"""Read the JSON in which an exported folder describes itself: its files and their checksums, and what they compute."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmdistill.files import file_hash
from fmdistill.registry import UserError

NAME, VERSION = "fmdistill.json", 1
KEYS = {"version", "kind", "format", "precision", "files", "model", "check", "source", "seal"}


@dataclass(frozen=True)
class Artefact:
    """An exported folder.

    `kind` is "sam" or "clip", `format` the export's name, `files` the sha256 of each file by its path in the folder,
    `model` what a predictor needs to run the files, `check` the figures measured before the export was published, and
    `source` the run that it was made from.
    """

    folder: Path
    kind: str
    format: str
    precision: str
    files: Mapping[str, str]
    model: Mapping[str, Any]
    check: Mapping[str, Any]
    source: Mapping[str, Any]

    def path(self, name: str) -> Path:
        """Return the path of one of its files, whose checksum is compared. Raises UserError if it is damaged."""
        path = self.folder / name
        if name not in self.files:
            raise UserError(f"{self.folder / NAME}: names no file {name!r}; export the run again")
        if not path.is_file():
            raise UserError(f"{path}: is missing, but {NAME} names it; export the run again")
        if file_hash(path) != self.files[name]:
            raise UserError(f"{path}: is not the file that was exported (checksum); export the run again")
        return path


def read(folder: str | Path) -> Artefact:
    """Return what the folder's JSON says. Raises UserError if it is missing, of another version, or was edited."""
    folder = Path(folder)
    path = folder / NAME
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: has no {NAME}, so it is no folder that fmdistill exported") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); export the run again") from None
    if not isinstance(stored, dict) or stored.get("version") != VERSION:
        version = stored.get("version") if isinstance(stored, dict) else type(stored).__name__
        raise UserError(f"{path}: has version {version!r}, this fmdistill reads {VERSION}; export the run again")
    if set(stored) != KEYS or stored.pop("seal") != seal(stored):
        raise UserError(f"{path}: was edited after the export, so it may not describe its files; export the run again")
    del stored["version"]
    return Artefact(folder, **stored)


def seal(description: Mapping[str, Any]) -> str:
    """Return the sha256 of a description without its seal; `read` compares it to notice edits."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
