"""Read and write files behind a URL through fsspec; every failure is one line that names the file."""

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec.core

from fmdistill.registry import UserError

# Object stores have no folders; making one would create the bucket, even if its name is mistyped.
OBJECTS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss")


@dataclass(frozen=True)
class Remote:
    """The folder at `url`. A storage that does not answer is never taken for an empty one; UserError if it fails."""

    url: str

    def names(self) -> set[str]:
        """Return the names of all files in the folder; none if it does not exist yet."""
        with self._failing(""):
            self._system.invalidate_cache()
            try:  # not `glob`, which treats a storage that does not answer as empty
                return {
                    str(path).rstrip("/").rpartition("/")[2] for path in self._system.ls(self._at(""), detail=False)
                }
            except FileNotFoundError:
                return set()

    def has(self, name: str) -> bool:
        """Return whether the file exists."""
        with self._failing(name):
            self._system.invalidate_cache()
            try:  # not `exists`, for the same reason
                self._system.info(self._at(name))
                return True
            except FileNotFoundError:
                return False

    def read(self, name: str) -> bytes:
        """Return the file's bytes."""
        with self._failing(name):
            return self._system.cat_file(self._at(name))

    def put(self, path: Path, name: str) -> None:
        """Upload the file at `path`, overwriting any file of that name."""
        with self._failing(name):
            if self.url.partition("://")[0] not in OBJECTS:
                self._system.makedirs(self._at(""), exist_ok=True)
            self._system.put_file(str(path), self._at(name))

    def get(self, name: str, path: Path) -> None:
        """Download the file to `path`."""
        with self._failing(name):
            self._system.get_file(self._at(name), str(path))

    def _at(self, name: str) -> str:
        return f"{self._system._strip_protocol(self.url).rstrip('/')}/{name}".removesuffix("/")

    @property
    def _system(self) -> Any:
        return _system(self.url, os.getpid(), threading.get_ident())

    @contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each file system has its own: botocore's, aiohttp's, OSErrors
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"{self.url}/{name}: {reason}; is the URL right, and may this machine read and write there?"
            ) from error


@functools.lru_cache(maxsize=64)
def _system(url: str, process: int, thread: int) -> Any:
    """Return the file system of `url`, for one thread of one process.

    Asynchronous file systems do not survive a fork, and some, such as FTP's, have a single connection.
    """
    try:
        return fsspec.core.url_to_fs(url, skip_instance_cache=True)[0]
    except (ImportError, ValueError) as error:
        raise UserError(
            f"cache.root={url}: {error}; for s3:// and gs:// install fmdistill with its extra `remote`"
        ) from error
