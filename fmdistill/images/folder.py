"""Source `folder`: the images in a folder and its subfolders, in shards that stay the same when files are added."""

import functools
import logging
import math
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from fmdistill.images.picture import HEAD, SUFFIXES, is_image
from fmdistill.images.source import Encoded
from fmdistill.registry import UserError

log = logging.getLogger(__name__)

BESIDE = ("json", "txt", "csv", "tsv", "xml", "yaml", "yml", "md", "html", "npy", "npz", "cls", "pdf", "log", "py")
SHOWN = 8  # how many suffixes a line about ignored files names


@dataclass(frozen=True)
class ImageFolder:
    """Images under `root`; a key is the path below `root`, with its suffix. Names that begin with a dot are ignored.

    A file's suffix tells whether it is an image or, if it has none, its first bytes. A log line counts the other files
    by suffix.

    A stable hash of the key decides the split and the shard: a file's split never changes, and an added file changes
    or splits only one shard (extendible hashing: Fagin et al., 1979). `validation` is the fraction of the images held
    out; with `validation_root`, the validation images are those under that folder instead.
    """

    root: str
    validation: float = 0.02
    shard_size: int = 256
    validation_root: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise UserError(f"images.validation={self.validation}: expected a fraction, at least 0 and below 1")
        if self.shard_size < 1:
            raise UserError(f"images.shard_size={self.shard_size}: expected at least 1 image in a shard")
        if self.validation_root is not None and self.validation not in (0, ImageFolder.validation):
            raise UserError(
                f"images.validation={self.validation}: ignored, since images.validation_root is "
                f"{self.validation_root}; set one of the two"
            )

    def shards(self) -> dict[str, list[str]]:
        """Return the names "train-<first bits of the hash>", or "train-all" while one shard is enough."""
        return {split: list(shards) for split, shards in self._listing.items()}

    def count(self, shard: str) -> int:
        """Return the number of images in the shard."""
        return len(self.keys(shard))

    def keys(self, shard: str) -> list[str]:
        """Return the shard's keys, sorted."""
        return self._listing[shard.partition("-")[0]][shard]

    def current_keys(self, shard: str) -> list[str]:
        """Return `keys`: adding or removing a file changes its shard."""
        return self.keys(shard)

    def read(self, shard: str) -> Iterator[Encoded]:
        """Yield the shard's images, sorted by key."""
        for key in self.keys(shard):
            yield self._read(shard, key)

    def fetch(self, shard: str, key: str) -> Encoded:
        """Return one image. Raises KeyError if the shard has no such key."""
        if key not in self.keys(shard):
            raise KeyError(key)
        return self._read(shard, key)

    def identity(self) -> dict:
        """Return the settings that determine keys, splits and shards."""
        held_out = self.validation if self.validation_root is None else "validation_root"
        return {"name": "folder", "validation": held_out, "shard_size": self.shard_size}

    def _base(self, split: str) -> Path:
        own_root = split == "validation" and self.validation_root is not None
        return Path(self.validation_root if own_root else self.root).expanduser()  # type: ignore[arg-type]

    def _read(self, shard: str, key: str) -> Encoded:
        path = self._base(shard.partition("-")[0]) / key
        try:
            return Encoded(key, path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); restore or remove it") from error

    @cached_property
    def _listing(self) -> dict[str, dict[str, list[str]]]:
        hashed = [(*_hash(key), key) for key in image_paths(self._base("train"), "images.root")]
        if self.validation_root is None:
            held_out = [(bits, key) for bits, fraction, key in hashed if fraction < self.validation]
            train = [(bits, key) for bits, fraction, key in hashed if fraction >= self.validation]
            if not train or (self.validation > 0 and not held_out):
                raise UserError(
                    f"images.validation={self.validation}: of the {len(hashed)} images in {self.root}, {len(held_out)} "
                    f"are for validation; set another fraction, 0 for none, or images.validation_root"
                )
        else:
            train = [(bits, key) for bits, _, key in hashed]
            base = self._base("validation")
            if base.resolve().is_relative_to(self._base("train").resolve()):
                raise UserError(
                    f"images.validation_root={self.validation_root}: is inside images.root={self.root}, so its "
                    f"images would also be training images; choose folders that do not overlap"
                )
            held_out = [(_hash(key)[0], key) for key in image_paths(base, "images.validation_root")]
        return {
            "train": dict(_buckets("train", "", sorted(train), self.shard_size)),
            "validation": dict(_buckets("validation", "", sorted(held_out), self.shard_size)),
        }


def validation_share(keys: Sequence[str], count: int) -> float:
    """Return a short decimal that, as `validation`, holds out exactly `count` of the images with these keys.

    It is as near to their share as the keys' hashes allow, since it applies to images that are added later too.
    """
    shares = sorted(_hash(key)[1] for key in keys)
    below, above = shares[count - 1], shares[count] if count < len(shares) else 1.0
    for digits in range(2, 16):
        least, most = math.floor(below * 10**digits) + 1, math.floor(above * 10**digits)
        if least <= min(most, 10**digits - 1):
            return min(max(round(count / len(keys) * 10**digits), least), most, 10**digits - 1) / 10**digits
    return above  # two hashes that are closer than that


def _hash(key: str) -> tuple[str, float]:
    digest = blake2b(os.fsencode(key), digest_size=16).digest()
    bits = f"{int.from_bytes(digest[:8], 'big'):064b}"
    return bits, (int.from_bytes(digest[8:], "big") >> 11) / 2**53


def _buckets(split: str, prefix: str, hashed: list[tuple[str, str]], size: int) -> Iterator[tuple[str, list[str]]]:
    if not hashed:
        return
    if len(hashed) <= size or len(prefix) == 64:
        yield f"{split}-{prefix or 'all'}", sorted(key for _, key in hashed)
        return
    for bit in "01":
        half = [(bits, key) for bits, key in hashed if bits[len(prefix)] == bit]
        yield from _buckets(split, prefix + bit, half, size)


def image_paths(root: Path, where: str) -> list[str]:
    """Return the paths of the images below `root`, relative to it; each image once, however many links lead to it.

    Raises UserError, which begins with the setting `where`, if there is no such folder or no image in it.
    """
    if not root.is_dir():
        raise UserError(f"{where}={root}: no such folder; expected a folder of images ({', '.join(SUFFIXES)})")
    paths, linked, visited, ignored = _walk(root)
    targets: set[str] = set()
    broken = 0
    for path in sorted(linked):
        target = os.path.realpath(path)
        if not os.path.isfile(target):
            broken += 1
        elif target not in targets and not (os.path.dirname(target) in visited and _is_image(target)):
            targets.add(target)
            paths.append(path)
    if broken:
        log.warning("%s=%s: ignored %d broken links to images", where, root, broken)
    if ignored:
        level = logging.INFO if set(ignored) <= set(BESIDE) else logging.WARNING
        _log_once(level, f"{where}={root}: ignored {by_suffix(ignored)}; images are {', '.join(SUFFIXES)}")
    if not paths:
        raise UserError(f"{where}={root}: contains no images; accepted are {', '.join(SUFFIXES)}, also in subfolders")
    return [Path(os.path.relpath(path, root)).as_posix() for path in paths]


@functools.cache
def _log_once(level: int, text: str) -> None:
    log.log(level, "%s", text)  # cached, since a command lists its images several times


def by_suffix(counts: Mapping[str, int]) -> str:
    """Format numbers of files by suffix as text, such as "3 .heic, 1 without a suffix" (suffix "")."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {f'.{suffix}' if suffix else 'without a suffix'}" for suffix, count in ranked[:SHOWN]]
    rest = sum(count for _, count in ranked[SHOWN:])
    return ", ".join([*parts, *([f"{rest} of {len(ranked) - SHOWN} other suffixes"] if rest else [])])


def _walk(root: Path) -> tuple[list[str], list[str], set[str], Counter[str]]:
    """Return the image files, the links that may be images, the real paths of all folders, and the counts of other
    files by suffix.

    Each folder is visited once, by its real path before any link to it: loops of links end, and no image gets two
    keys, one of which might be for training and the other for validation.
    """
    paths, linked, visited, ignored = [], [], set(), Counter()
    folders, links = deque([str(root)]), deque()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        real = os.path.realpath(folder)
        if real in visited:
            continue
        visited.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):
                (links if entry.is_symlink() else folders).append(entry.path)
            elif _is_image(entry.path):
                (linked if entry.is_symlink() else paths).append(entry.path)
            else:
                ignored[_suffix(entry.name)] += 1
    return paths, linked, visited, ignored


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _is_image(path: str) -> bool:
    """Return whether a file is an image, by its suffix or, if it has none, by its first bytes."""
    name = os.path.basename(path)
    if name.startswith("."):
        return False
    if suffix := _suffix(name):
        return suffix in SUFFIXES
    if not os.path.isfile(path):  # opening a pipe would block
        return False
    try:
        with open(path, "rb") as file:
            return is_image(file.read(HEAD))
    except OSError:
        return False
