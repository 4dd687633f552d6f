"""Images in one folder per class: the label is the folder's number, or its place among folders that have names."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from fmdistill.images.folder import Folder
from fmdistill.images.source import Encoded
from fmdistill.registry import UserError

NUMBER = re.compile(r"-?[0-9]{1,18}")
LARGEST = 999_999  # label: a larger number is a date or an identifier


@dataclass(frozen=True)
class ImageClasses:
    """Images under `root`/CLASS; a key is the path below `root`.

    If every CLASS is a whole number, as in ImageNetV2, that number is the label; numbers may be missing. Otherwise the
    label is the place of CLASS among all of them, sorted as text, as ImageNet's wnids are.

    The images of `root` are for validation, all that a protocol needs. With `validation_root`, whose class folders
    must be the same (of numbers some may be missing), those of `root` are for training: what a recipe needs. Sorting,
    shards and links are as in `folder`; a class folder without images keeps its label, and one that begins with a dot
    is left out.
    """

    root: str
    validation_root: str | None = None
    shard_size: int = 256

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UserError(f"images.shard_size={self.shard_size}: expected at least 1 image in a shard")

    @property
    def classes(self) -> list[str]:
        """The class folders' names by label. UserError if there are none, or labels cannot be told from them."""
        return sorted(self.label_of, key=self.label_of.__getitem__)

    @cached_property
    def label_of(self) -> dict[str, int]:
        """The label of each class folder of `root` and `validation_root`. UserError as `classes` raises."""
        labels = _labels(self.root, "images.root")
        if self.validation_root is None:
            return labels
        others = _labels(self.validation_root, "images.validation_root")
        where = f"images.validation_root={self.validation_root}"
        if _are_numbers(labels) and _are_numbers(others):  # a label is its number, whatever else is there
            if beyond := [name for name, label in others.items() if label not in labels.values()]:
                raise UserError(
                    f"{where}: class folder '{beyond[0]}' is a label that no folder of images.root={self.root} has; "
                    f"give both the same numbers"
                )
        elif differ := set(others) ^ set(labels):
            raise UserError(
                f"{where}: its {len(others)} class folders are not the {len(labels)} of images.root={self.root}, "
                f"first '{min(differ)}'; labels are their places, so give both the same folders (an empty one will do)"
            )
        return {**labels, **others}

    @property
    def numbered(self) -> bool:
        """Whether the folders' names are the labels."""
        return _are_numbers(self.label_of)

    def shards(self) -> dict[str, list[str]]:
        """Return the names "validation-<first bits of the hash>", and "train-..." with a `validation_root`."""
        _ = self.label_of
        listed = self._folder.shards()
        if self.validation_root is None:
            listed = {"train": [], "validation": [_swapped(name) for name in listed["train"]]}
        for names in listed.values():
            loose = [key for name in names for key in self.keys(name) if "/" not in key]
            if loose:
                raise UserError(
                    f"images.root={self.root}: {len(loose)} images lie outside the class folders, first "
                    f"'{min(loose)}'; move them into one, or take them out"
                )
        return listed

    def count(self, shard: str) -> int:
        """Return how many images the shard holds."""
        return self._folder.count(self._inner(shard))

    def keys(self, shard: str) -> list[str]:
        """Return the shard's keys, sorted."""
        return self._folder.keys(self._inner(shard))

    def listed(self, shard: str) -> list[str]:
        """Return `keys`, since a file that is added or removed changes its shard."""
        return self.keys(shard)

    def read(self, shard: str) -> Iterator[Encoded]:
        """Yield the shard's images with their labels, sorted by key."""
        for encoded in self._folder.read(self._inner(shard)):
            yield self._labelled(encoded)

    def fetch(self, shard: str, key: str) -> Encoded:
        """Return one image with its label; KeyError where the shard holds no such key."""
        return self._labelled(self._folder.fetch(self._inner(shard), key))

    def identity(self) -> dict:
        """Return what decides keys, splits, shards and labels: another name among the folders moves those after it."""
        held_out = "root" if self.validation_root is None else "validation_root"
        names = "\n".join(self.classes).encode(errors="surrogateescape")
        classes = "numbers" if self.numbered else blake2b(names, digest_size=8).hexdigest()
        return {"name": "image_classes", "validation": held_out, "shard_size": self.shard_size, "classes": classes}

    @cached_property
    def _folder(self) -> Folder:
        return Folder(self.root, 0.0, self.shard_size, self.validation_root)

    def _inner(self, shard: str) -> str:
        return _swapped(shard) if self.validation_root is None else shard

    def _labelled(self, encoded: Encoded) -> Encoded:
        return replace(encoded, label=self.label_of[encoded.key.partition("/")[0]])

    def labels(self, shard: str) -> list[int | None]:
        """Return the labels of the shard's images, in the order of the keys, without reading them."""
        return [self.label_of[key.partition("/")[0]] for key in self.keys(shard)]


def _swapped(shard: str) -> str:
    """Return the name under the other split: all of a lone root is `train` to Folder and validation to us."""
    split, _, rest = shard.partition("-")
    return f"{'validation' if split == 'train' else 'train'}-{rest}"


def _labels(root: str, where: str) -> dict[str, int]:
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(f"{where}={root}: no such folder; give one that holds a folder of images per class")
    names = sorted(e.name for e in os.scandir(base) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(
            f"{where}={root}: holds no class folders; expected {root}/CLASS/IMAGE, such as ImageNet's n01440764"
        )
    if _are_numbers(names):
        return _numbers(names, f"{where}={root}")
    numbers = [name for name in names if NUMBER.fullmatch(name)]
    if numbers != sorted(numbers, key=int):  # as text 10 comes before 2, which is right for nobody
        odd = next(name for name in names if not NUMBER.fullmatch(name))
        raise UserError(
            f"{where}={root}: {len(numbers)} class folders are numbers and '{odd}' is none, so they are neither labels "
            f"nor in order; take '{odd}' out, or write all numbers with the same count of digits"
        )
    return {name: label for label, name in enumerate(names)}


def _are_numbers(names: Iterable[str]) -> bool:
    return all(NUMBER.fullmatch(name) for name in names)


def _numbers(names: list[str], where: str) -> dict[str, int]:
    labels: dict[str, int] = {}
    known: dict[int, str] = {}
    for name in sorted(names, key=int):
        label = int(name)
        if label < 0 or label > LARGEST:
            raise UserError(
                f"{where}: class folder '{name}' is a number, so a label, and labels are 0 to {LARGEST}; rename it"
            )
        if label in known:
            raise UserError(f"{where}: class folders '{known[label]}' and '{name}' are the same label; merge them")
        known[label] = name
        labels[name] = label
    return labels
