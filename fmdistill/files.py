"""Files that appear whole or not at all, whoever is killed, and the hash of one."""

import hashlib
import os
import platform
import secrets
from pathlib import Path


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Put `content` (text as UTF-8) at `path` in place of whatever is there; after an error that is still there."""
    temporary = _write_temporary(Path(path), content)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_first(path: Path, content: bytes | str) -> None:
    """Put `content` at `path` whole, unless something is there already."""
    temporary = _write_temporary(path, content)
    try:
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> bool:
    """Rename `temporary` to `path` if nothing is there; return whether it was."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.rename(temporary, path)
        return True
    temporary.unlink()
    return True


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` that no other process uses: host, process id and a random part."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def sweep(folder: Path) -> None:
    """Remove the temporary files that dead processes of this host left in `folder`."""
    for path in folder.glob(f".*.{_host()}.*.tmp"):
        process = path.name.split(".")[-3]
        if process.isdigit() and not _alive(int(process)):
            path.unlink(missing_ok=True)


def file_hash(path: str | Path) -> str:
    """Return the sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write_temporary(path: Path, content: bytes | str) -> Path:
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _host() -> str:
    return "".join(c if c.isalnum() else "-" for c in platform.node()) or "host"
