"""Files that appear whole or not at all, whoever is killed, and the hash of one."""

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
STALE = 48 * 3600  # seconds without a write, after which a temporary file is taken to be a dead process's


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Put `content` (text as UTF-8) at `path` in place of whatever is there; after an error that is still there."""
    temporary = write_temporary(Path(path), content)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_first(path: Path, content: bytes | str) -> None:
    """Put `content` at `path` whole, unless something is there already."""
    temporary = write_temporary(path, content)
    try:
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(folder: str | Path, what: str) -> None:
    """Raise an OSError that names `folder` unless `what` can be written into it; it need not exist yet."""
    folder = Path(folder)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{what} cannot be written: this is no folder", str(nearest))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{what} cannot be written into this folder", str(nearest))


def publish(temporary: Path, path: Path) -> bool:
    """Rename `temporary` to `path` if nothing is there; return whether it was."""
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
    """Return a name beside `path` that no other process uses: host, process id and a random part."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def sweep(folder: Path) -> None:
    """Remove the temporary files in `folder` that dead processes left: of this host, and of any that are `STALE`.

    A live process's are not touched, wherever it runs: its writing keeps the file's time fresh.
    """
    for path in folder.glob(".*.tmp"):
        if _abandoned(path):
            path.unlink(missing_ok=True)


def being_written(path: Path) -> bool:
    """Return whether another process seems to be writing `path`; a dead one of another host seems so until `STALE`."""
    own = f".{_host()}.{os.getpid()}."
    return any(
        own not in one.name and not _abandoned(one) for one in path.parent.glob(f".{glob.escape(path.name)}.*.tmp")
    )


@dataclass(frozen=True)
class Process:
    """A process, by its host and number."""

    host: str
    number: int

    @classmethod
    def own(cls) -> "Process":
        """Return the running one."""
        return cls(_host(), os.getpid())

    def wait(self, seconds: float) -> None:
        """Wait until the process is gone, for at most so long; one of another host is not waited for."""
        until = time.monotonic() + seconds
        while self.host == _host() and _alive(self.number) and time.monotonic() < until:
            time.sleep(0.01)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of the block name `path`: a full disk's names nothing."""
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
    """Put `content` on disk under a temporary name beside `path`; return that name."""
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
    named = re.fullmatch(r"\..+\.([^.]+)\.(\d+)\.[0-9a-f]{8}\.tmp", temporary.name)
    if named is None:  # some other program's
        return False
    if named[1] == _host() and not _alive(int(named[2])):
        return True
    try:  # also of a living process of this host, which may have got the number of a dead one
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
    """Return the host's name and a hash of its boot and process namespace, within which a process id means one process.

    Machines and containers may share a name; after a restart the files from before it wait for `STALE`.
    """
    name = "".join(c if c.isalnum() else "-" for c in platform.node()) or "host"
    try:
        running = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return name
    return f"{name}-{hashlib.sha256(running.encode()).hexdigest()[:8]}"
