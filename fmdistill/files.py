"""Write files atomically: a file is complete or absent, even if the process is killed."""

import errno
import glob
import hashlib
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
STALE = 48 * 3600  # seconds without a write, after which a temporary file is considered abandoned


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path`, replacing an existing file; an error leaves that file unchanged."""
    temporary = write_temporary(Path(path), content)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_first(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` atomically, unless the file exists already."""
    temporary = write_temporary(path, content)
    try:
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(folder: str | Path, what: str) -> None:
    """Check that `what` can be written into `folder`, which need not exist yet. Raises OSError if not."""
    folder = Path(folder)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{what} cannot be written: this is not a folder", str(nearest))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{what} cannot be written into this folder", str(nearest))


def publish(temporary: Path, path: Path) -> bool:
    """Rename `temporary` to `path` unless that exists; return whether it was renamed."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:  # a file system without hard links
        if error.errno in FULL:
            raise
        if path.exists():
            return False
        os.rename(temporary, path)
        return True
    temporary.unlink()
    return True


def temporary_name(path: Path) -> Path:
    """Return a name in the folder of `path` that no other process uses: host, process id and a random part."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def sweep(folder: Path) -> None:
    """Remove the temporary files of dead processes from `folder`: those of this host, and all that are `STALE`.

    Files of live processes stay, also on other hosts, since each write updates a file's time.
    """
    for path in folder.glob(".*.tmp"):
        if _abandoned(path):
            path.unlink(missing_ok=True)


def being_written(path: Path) -> bool:
    """Return whether another process seems to be writing `path`; if it died on another host, until `STALE`."""
    own = f".{_host()}.{os.getpid()}."
    temporaries = path.parent.glob(f".{glob.escape(path.name)}.*.tmp")
    return any(own not in temporary.name and not _abandoned(temporary) for temporary in temporaries)


@dataclass(frozen=True)
class Process:
    """A process, identified by its host and process id."""

    host: str
    number: int

    @classmethod
    def own(cls) -> "Process":
        """Return the current process."""
        return cls(_host(), os.getpid())

    def wait(self, seconds: float) -> None:
        """Wait until the process has ended, but at most `seconds`; return at once if it is on another host."""
        until = time.monotonic() + seconds
        while self.host == _host() and _alive(self.number) and time.monotonic() < until:
            time.sleep(0.01)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of `path` to an OSError raised in the block, since the error of a full disk has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def file_hash(path: str | Path) -> str:
    """Return the sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_temporary(path: Path, content: bytes | str) -> Path:
    """Write `content` to a temporary file in the folder of `path` and return the file's path."""
    temporary = temporary_name(path)
    try:
        with naming(path), open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _abandoned(temporary: Path) -> bool:
    parts = re.fullmatch(r"\..+\.([^.]+)\.(\d+)\.[0-9a-f]{8}\.tmp", temporary.name)
    if parts is None:  # of another program
        return False
    if parts[1] == _host() and not _alive(int(parts[2])):
        return True
    try:  # also if the process of this host lives, which may have the process id of a dead one
        return time.time() - temporary.stat().st_mtime > STALE
    except FileNotFoundError:
        return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@cache
def _host() -> str:
    """Return the host's name and a hash of its boot and its process namespace, in which process ids are unique.

    The hash is needed since machines and containers may share a name. Files from before a restart stay until `STALE`.
    """
    name = "".join(c if c.isalnum() else "-" for c in platform.node()) or "host"
    try:
        running = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return name
    return f"{name}-{hashlib.sha256(running.encode()).hexdigest()[:8]}"
