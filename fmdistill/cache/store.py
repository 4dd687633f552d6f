"""Store a cache's files: in a folder, or behind a URL with a bounded local copy."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fmdistill.cache.bucket import Bucket
from fmdistill.cache.descriptor import Descriptor, held_open
from fmdistill.recipe import CacheSettings


class Store(Protocol):
    """The files of one cache. Small files (manifest, head, sidecars) are always in the local `folder`."""

    @property
    def folder(self) -> Path:
        """Return the local folder."""
        ...

    def open(self) -> None:
        """Make the local folder ready for use."""
        ...

    def pull(self) -> None:
        """Download the small files that other machines have written."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep this machine's other processes from `pull` for the block, in which a manifest is claimed and shared."""
        ...

    def share(self) -> None:
        """Give manifest, head and recipe to other machines, or take those that were first; call it `exclusive`."""
        ...

    def sidecars(self, shard: str) -> list[tuple[Path, bool]]:
        """Return the paths at which the shard's sidecar may be, in order, and whether its tar must be there too."""
        ...

    def names(self) -> list[str]:
        """Return the names, sorted, of the files in the local folder that may be shards."""
        ...

    def look(self, shard: str) -> None:
        """Download the sidecars of one shard that other machines have written meanwhile."""
        ...

    def send(self, shard: str) -> None:
        """Give a shard that was written in the local folder to other machines."""
        ...

    def fetch(self, name: str, sha256: str) -> Path:
        """Return the local path of the tar called `name`, downloaded first if needed; DamagedError if it differs."""
        ...

    def read(self, name: str, sha256: str, owner: object) -> Descriptor:
        """Return the tar called `name` opened for reading. `owner` tells a shard from one that replaced it."""
        ...

    def address(self, name: str) -> str:
        """Return where the file called `name` is, for a message."""
        ...

    def note(self, name: str) -> str:
        """Return what to add to a message about the local file called `name`, such as whose copy it is."""
        ...

    def free(self) -> int | None:
        """Return the bytes that are free for shards; None if that is not known."""
        ...


@dataclass(frozen=True)
class Folder:
    """A store on a disk, which any number of processes and machines may share."""

    folder: Path

    def open(self) -> None:
        """Do nothing: a folder is made when a manifest is claimed in it."""

    def pull(self) -> None:
        """Do nothing: other machines write into the same folder."""

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Do nothing for the block: files appear whole, and the first one wins."""
        yield

    def share(self) -> None:
        """Do nothing: other machines see the same folder."""

    def sidecars(self, shard: str) -> list[tuple[Path, bool]]:
        """Return the path of the shard's sidecar, whose tar must be beside it."""
        return [(self.folder / f"{shard}.json", True)]

    def names(self) -> list[str]:
        """Return the names, sorted, of the files that may be shards."""
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def look(self, shard: str) -> None:
        """Do nothing: other machines write into the same folder."""

    def send(self, shard: str) -> None:
        """Do nothing: other machines see the same folder."""

    def fetch(self, name: str, sha256: str) -> Path:
        """Return the path of the tar called `name`."""
        return self.folder / name

    def read(self, name: str, sha256: str, owner: object) -> Descriptor:
        """Return the tar called `name` opened for reading, and held open for the next time."""
        return held_open(f"{self.folder}/{name}", owner)  # a Path costs as much as reading a small map

    def address(self, name: str) -> str:
        """Return the path of the file called `name`."""
        return str(self.folder / name)

    def note(self, name: str) -> str:
        """Return no text: the local file is the file itself."""
        return ""

    def free(self) -> int | None:
        """Return the bytes that are free on the disk."""
        return shutil.disk_usage(self.folder).free


def of(settings: CacheSettings) -> Store:
    """Return the store of the cache at `settings.root`, without opening it: nothing is made or downloaded."""
    root = settings.root
    if "://" not in root:
        return Folder(Path(root))
    home = Path(settings.local or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmdistill")
    url = root.rstrip("/")
    return Bucket(url, home / hashlib.sha256(url.encode()).hexdigest()[:32], settings.local_bytes)


def opened(settings: CacheSettings) -> Store:
    """Return the store of the cache at `settings.root`, ready for use: of a URL with all small files downloaded."""
    store = of(settings)
    store.open()
    return store
