"""Images in one folder per class, such as ImageNet's folders of wnids: the folder's place among them is the label."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from fmdistill.images.folder import Folder
from fmdistill.images.source import Encoded
from fmdistill.registry import UserError


@dataclass(frozen=True)
class ImageClasses:
    """Images under `root`/CLASS; a label is the index of CLASS among the sorted folders, a key the path below `root`.

    The images of `root` are for validation, all that a protocol needs. With `validation_root`, whose class folders
    must be the same, those of `root` are for training: what a recipe needs. Sorting, shards and links are as in
    `folder`; a class folder without images keeps its number, and one that begins with a dot is left out.
    """

    root: str
    validation_root: str | None = None
    shard_size: int = 256

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UserError(f"images.shard_size={self.shard_size}: expected at least 1 image in a shard")

    @cached_property
    def classes(self) -> list[str]:
        """The class folders' names, label 0 first. UserError where there are none, or the two roots' differ."""
        names = _classes(self.root, "images.root")
        if self.validation_root is not None:
            others = _classes(self.validation_root, "images.validation_root")
            if names != others:
                odd = min(set(names) ^ set(others))
                raise UserError(
                    f"images.validation_root={self.validation_root}: its {len(others)} class folders are not the "
                    f"{len(names)} of images.root={self.root}, first '{odd}'; labels are their places, so give both "
                    f"the same folders (an empty one will do)"
                )
        return names

    def shards(self) -> dict[str, list[str]]:
        """Return the names "validation-<first bits of the hash>", and "train-..." with a `validation_root`."""
        _ = self.classes
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
        """Return what decides keys, splits, shards and labels: another class among the folders moves those after it."""
        held_out = "root" if self.validation_root is None else "validation_root"
        classes = blake2b("\n".join(self.classes).encode(errors="surrogateescape"), digest_size=8).hexdigest()
        return {"name": "image_classes", "validation": held_out, "shard_size": self.shard_size, "classes": classes}

    @cached_property
    def _folder(self) -> Folder:
        return Folder(self.root, 0.0, self.shard_size, self.validation_root)

    @cached_property
    def _labels(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.classes)}

    def _inner(self, shard: str) -> str:
        return _swapped(shard) if self.validation_root is None else shard

    def _labelled(self, encoded: Encoded) -> Encoded:
        return replace(encoded, label=self._labels[encoded.key.partition("/")[0]])

    def labels(self, shard: str) -> list[int | None]:
        """Return the labels of the shard's images, in the order of the keys, without reading them."""
        return [self._labels[key.partition("/")[0]] for key in self.keys(shard)]


def _swapped(shard: str) -> str:
    """Return the name under the other split: all of a lone root is `train` to Folder and validation to us."""
    split, _, rest = shard.partition("-")
    return f"{'validation' if split == 'train' else 'train'}-{rest}"


def _classes(root: str, where: str) -> list[str]:
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(f"{where}={root}: no such folder; give one that holds a folder of images per class")
    names = sorted(e.name for e in os.scandir(base) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(
            f"{where}={root}: holds no class folders; expected {root}/CLASS/IMAGE, such as ImageNet's n01440764"
        )
    return names
