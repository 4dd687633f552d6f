"""Tell whether a cache's teacher is still the one that made it, without opening the teacher's weights.

Hashing a checkpoint of gigabytes takes longer than looking for missing shards. So when a teacher was loaded and its
fingerprint is the manifest's, its settings and the sizes and times of its files are written to teacher.json. While
these stay the same, so does the teacher. The file is no part of the cache's identity: a copy of the cache on another
machine loads the teacher once more.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fmdistill
from fmdistill.files import write_whole

NAME = "teacher.json"
PACKAGED = Path(fmdistill.__file__).parent / "mini/weights"  # holds NAME.safetensors for two teachers
FOLDER = "local-dir:"  # begins a model that is a folder of open_clip's
NO_VALUES = ("device", "batch", "workers")  # settings that change no value that is cached


def note(settings: Mapping[str, Any], root: Path) -> None:
    """Write to `root`, if it is writable, that the teacher of these settings was loaded and is the cache's."""
    described = _described(settings)
    if described is not None and described != _read(root) and os.access(root, os.W_OK):
        write_whole(root / NAME, json.dumps(described, indent=1))


def is_noted(settings: Mapping[str, Any], root: Path) -> bool:
    """Return whether `note` wrote these settings and files; a file that is missing now counts as unchanged."""
    described, noted = _described(settings), _read(root)
    if described is None or noted is None or described["settings"] != noted.get("settings"):
        return False
    files = noted.get("files")
    return isinstance(files, dict) and all(files.get(path) == stat for path, stat in described["files"].items())


def lost_files(root: Path) -> list[str]:
    """Return the teacher's files that teacher.json in `root` names and that do not exist any more."""
    files = (_read(root) or {}).get("files")
    return [path for path in files if not Path(path).exists()] if isinstance(files, dict) else []


def _described(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return JSON of the settings and the files that they name; None for a teacher of another package's code."""
    if ":" in settings["name"]:
        return None
    kept = {key: value for key, value in settings.items() if key not in NO_VALUES}
    files = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in _files(kept)}
    return json.loads(json.dumps({"settings": kept, "files": files}))


def _files(settings: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the files that settings name, those of a folder too."""
    packaged = PACKAGED / f"{settings['name']}.safetensors"
    if settings.get("weights", "packaged") == "packaged" and packaged.is_file():
        yield packaged
    for value in settings.values():
        path = Path(value.removeprefix(FOLDER)).absolute() if isinstance(value, str) and value else None
        if path is not None and path.is_file():
            yield path
        elif path is not None and path.is_dir():
            yield from sorted(child for child in path.iterdir() if child.is_file())


def _read(root: Path) -> dict[str, Any] | None:
    try:
        noted = json.loads((root / NAME).read_text())
    except (OSError, ValueError):
        return None
    return noted if isinstance(noted, dict) else None
