"""Store a cache behind a URL that fsspec knows, such as s3://bucket/cache, with a folder on this machine.

No file in the bucket is ever overwritten, so no lock is needed and no copy becomes stale. A shard is NAME-HASH.tar and
NAME-HASH.json, uploaded in this order; HASH is the start of the tar's sha256. If two machines write the same shard, the
bucket holds both, and every reader uses the first one whose sidecar is whole. Manifest, head and recipe are uploaded
once.

The local folder holds all small files and as many tars as fit; the least recently used tars are deleted first. Its name
is a hash of the URL, so two caches never share a folder. A shard that was written but not uploaded is NAME.tar and
NAME.json, as in any cache; the next process that opens the folder uploads it.
"""

import fcntl
import functools
import glob
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fmdistill.cache import seal
from fmdistill.cache.descriptor import Descriptor
from fmdistill.cache.remote import Remote
from fmdistill.files import file_hash, sweep, temporary_name, write_whole
from fmdistill.logs import log
from fmdistill.registry import UserError

MANIFEST = "manifest.json"
ONCE = (MANIFEST, "head.json", "head.safetensors", "recipe.yaml")
SENT = re.compile(r"(.+)-[0-9a-f]{16}\.(json|tar)")


class DamagedError(UserError):
    """A tar in the bucket differs from its sidecar. The text after the last semicolon is the way out."""


@dataclass(frozen=True)
class Bucket:
    """The store at `url`, whose local folder holds tars of up to `limit` bytes."""

    url: str
    folder: Path
    limit: int

    def open(self) -> None:
        """Make the local folder hold all small files of the bucket, and send the shards that were left unsent."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)  # downloads that died
        self.pull()
        for path in sorted(self.folder.glob("*.json")):
            if path.with_suffix(".tar").exists() and not SENT.fullmatch(path.name):
                self.send(path.stem)

    def pull(self) -> None:
        """Download the small files that are missing here, and drop those of a cache that was at the URL before."""
        with self.exclusive():
            self._pull()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep this machine's other processes from `pull` for the block, in which a manifest is claimed and shared."""
        with _locked(self.folder / ".claim.lock"):
            yield

    def free(self) -> int | None:
        """Return None: the room behind a URL is not known, and this machine holds a part of the shards only."""
        return None

    def address(self, name: str) -> str:
        """Return where the file called `name` is, for a message."""
        return f"{self.url}/{name}"

    def note(self, name: str) -> str:
        """Return what to add to a message about the local file called `name`."""
        return f" (a copy of {self.address(name)})"

    def read(self, name: str, sha256: str, owner: object) -> Descriptor:
        """Return the tar called `name` opened for reading, downloaded first if needed."""
        while True:
            try:  # not held open: a tar that was evicted would go on to fill the disk
                opened = Descriptor(self.folder / name)
            except FileNotFoundError:
                self.fetch(name, sha256)  # and another process may need the room before this one opens it
            else:
                os.utime(opened.number)  # so that the longest unused is evicted
                return opened

    def _pull(self) -> None:
        names = self._remote.names()
        here = self.folder / MANIFEST  # uploaded before any shard, so a bucket without one holds no shard of this cache
        if here.exists() and MANIFEST not in names and self._shards():
            raise UserError(
                f"{self.url}: its {MANIFEST} is gone, and {self.folder} holds shards of that cache; is the URL right, "
                f"and does it still hold the cache? If the cache was deleted, delete {self.folder} too"
            )
        if here.exists() and (MANIFEST not in names or self._remote.read(MANIFEST) != here.read_bytes()):
            log.info("%s: another cache than before; %s starts anew", self.url, self.folder)
            for path in self.folder.iterdir():
                if not path.name.startswith(".") and path.is_file():  # settings, locks, and what is being written
                    path.unlink(missing_ok=True)
        self._take(names)
        for name in sorted(names & set(ONCE)):
            if not (self.folder / name).exists():
                write_whole(self.folder / name, self._remote.read(name))

    def _shards(self) -> list[Path]:
        return [path for path in self.folder.glob("*.tar") if not path.name.startswith(".")]

    def _take(self, names: set[str], prefix: str = "") -> None:
        """Download the sidecars in `names` whose tar is among them, and delete local ones whose tar the bucket lost."""
        for name in sorted(names):
            if SENT.fullmatch(name) and name.endswith(".json") and _tar(name) in names:
                if not (self.folder / name).exists():
                    write_whole(self.folder / name, self._remote.read(name))
        for path in self.folder.glob(f"{glob.escape(prefix)}*.json"):
            if (sent := SENT.fullmatch(path.name)) and _tar(path.name) not in names:
                with _locked(self.folder / f".{sent[1]}.lock"):  # unless it was sent since the names were listed
                    if not self._remote.has(_tar(path.name)):
                        path.unlink(missing_ok=True)

    def sidecars(self, shard: str) -> list[tuple[Path, bool]]:
        """Return the shard's sidecars that are here, as every machine tries them, and whether the tar must be too."""
        sent = _sidecars(self.folder, self.folder.stat().st_mtime_ns).get(shard, [])
        return [(self.folder / f"{shard}.json", True), *((path, False) for path in sent)]

    def names(self) -> list[str]:
        """Return the names, sorted, of the files in the local folder that may be shards."""
        stems = {path.name: path.stem for path in self.folder.glob("*.json")}
        return sorted({sent[1] if (sent := SENT.fullmatch(name)) else stem for name, stem in stems.items()})

    def look(self, shard: str) -> None:
        """Download the sidecars of one shard that other machines have uploaded meanwhile."""
        self._take({name for name in self._remote.names() if name.startswith(f"{shard}-")}, f"{shard}-")

    def share(self) -> None:
        """Upload manifest, head and recipe, each unless the bucket has it, and download those; call it `exclusive`."""
        names = self._remote.names()
        for name in ONCE:
            if name not in names and (self.folder / name).exists():
                self._remote.put(self.folder / name, name)
        self._pull()  # another machine may have uploaded its manifest first

    def send(self, shard: str) -> None:
        """Upload a shard that was written locally, the tar first; then rename its files as if they were downloaded."""
        tar, sidecar = self.folder / f"{shard}.tar", self.folder / f"{shard}.json"
        with _locked(self.folder / f".{shard}.lock"):
            if not (tar.exists() and sidecar.exists()):  # another process of this machine has sent it
                return
            fields = json.loads(sidecar.read_text())
            if seal.read(tar) != (fields["bytes"], fields["seal"]):  # another writer's; the next run writes it anew
                return
            name = f"{shard}-{fields['sha256'][:16]}"
            self._remote.put(tar, f"{name}.tar")
            self._remote.put(sidecar, f"{name}.json")
            os.replace(tar, self.folder / f"{name}.tar")
            os.replace(sidecar, self.folder / f"{name}.json")
        self._evict(keep=f"{name}.tar")

    def fetch(self, name: str, sha256: str) -> Path:
        """Return the local path of the tar `name`, downloading it first if needed. DamagedError if it is damaged."""
        path = self.folder / name
        with _locked(self.folder / f".{name}.lock"):  # only one of several processes and threads downloads
            try:
                os.utime(path)
                return path
            except FileNotFoundError:
                pass
            temporary = temporary_name(path)
            try:
                self._remote.get(name, temporary)
                if file_hash(temporary) != sha256:
                    raise DamagedError(
                        f"{self.url}/{name}: differs from its sidecar (sha256); delete it there and run "
                        f"`fmdistill cache` again"
                    )
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            self._evict(keep=name)
        return path

    def _evict(self, keep: str) -> None:
        tars = [path for path in self.folder.glob("*.tar") if SENT.fullmatch(path.name)]
        held = {path: stat for path in tars if (stat := _stat(path))}
        total = sum(stat.st_size for stat in held.values())
        for path in sorted(held, key=lambda tar: held[tar].st_mtime):
            if total > self.limit and path.name != keep:
                path.unlink(missing_ok=True)  # who has it open reads on
                total -= held[path].st_size

    @property
    def _remote(self) -> Remote:
        return Remote(self.url)


@functools.lru_cache(maxsize=2)
def _sidecars(folder: Path, changed: int) -> dict[str, list[Path]]:
    by_shard: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.json")):
        if named := SENT.fullmatch(path.name):
            by_shard.setdefault(named[1], []).append(path)
    return by_shard


def _tar(sidecar: str) -> str:
    return sidecar.removesuffix(".json") + ".tar"


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
