"""Source `image_classes`: one folder of images per class; a folder's number or its index by name is the label."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from fmdistill.images.folder import ImageFolder
from fmdistill.images.source import Encoded
from fmdistill.registry import UserError

NUMBER = re.compile(r"-?[0-9]{1,18}")
LARGEST = 999_999  # label: a larger number is a date or an identifier


@dataclass(frozen=True)
class ImageClasses:
    """Images under `root`/CLASS; a key is the path below `root`.

    If every CLASS is a whole number, as in ImageNetV2, that number is the label; numbers may be missing. Otherwise the
    label is the index of CLASS among the class folders sorted as text, like ImageNet's wnids.

    The images of `root` are for validation, which is enough for a protocol. With `validation_root`, as a recipe needs,
    they are for training, and both roots must have the same class folders (if these are numbers, some may be missing
    in `validation_root`). Sorting, shards and links are as in `folder`. An empty class folder has a label too; a
    folder whose name begins with a dot is ignored.
    """

    root: str
    validation_root: str | None = None
    shard_size: int = 256

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UserError(f"images.shard_size={self.shard_size}: expected at least 1 image in a shard")

    @property
    def classes(self) -> list[str]:
        """The names of the class folders, by label. Raises UserError if there are none or their labels are unclear."""
        return sorted(self.label_of, key=self.label_of.__getitem__)

    @cached_property
    def label_of(self) -> dict[str, int]:
        """The label of each class folder of `root` and `validation_root`. Raises UserError like `classes`."""
        labels = _labels(self.root, "images.root")
        if self.validation_root is None:
            return labels
        others = _labels(self.validation_root, "images.validation_root")
        where = f"images.validation_root={self.validation_root}"
        if _are_numbers(labels) and _are_numbers(others):  # the labels do not depend on the other folders
            if unknown := [name for name, label in others.items() if label not in labels.values()]:
                raise UserError(
                    f"{where}: class folder '{unknown[0]}' is a label that no folder of images.root={self.root} has; "
                    f"give both the same numbers"
                )
        elif different := set(others) ^ set(labels):
            raise UserError(
                f"{where}: its {len(others)} class folders are not the {len(labels)} of images.root={self.root}, the "
                f"first difference is '{min(different)}'; labels are indices, so both need the same folders (they may "
                f"be empty)"
            )
        return {**labels, **others}

    @property
    def numbered(self) -> bool:
        """Whether the folders' names are the labels."""
        return _are_numbers(self.label_of)

    def shards(self) -> dict[str, list[str]]:
        """Return the names "validation-<first bits of the hash>", and with a `validation_root` also "train-..."."""
        _ = self.label_of
        shards = self._folder.shards()
        if self.validation_root is None:
            shards = {"train": [], "validation": [_other_split(name) for name in shards["train"]]}
        for names in shards.values():
            loose = [key for name in names for key in self.keys(name) if "/" not in key]
            if loose:
                raise UserError(
                    f"images.root={self.root}: {len(loose)} images are not in a class folder, first '{min(loose)}'; "
                    f"move them into one, or remove them"
                )
        return shards

    def count(self, shard: str) -> int:
        """Return the number of images in the shard."""
        return self._folder.count(self._inner(shard))

    def keys(self, shard: str) -> list[str]:
        """Return the shard's keys, sorted."""
        return self._folder.keys(self._inner(shard))

    def current_keys(self, shard: str) -> list[str]:
        """Return `keys`: adding or removing a file changes its shard."""
        return self.keys(shard)

    def read(self, shard: str) -> Iterator[Encoded]:
        """Yield the shard's images with their labels, sorted by key."""
        for encoded in self._folder.read(self._inner(shard)):
            yield self._labelled(encoded)

    def fetch(self, shard: str, key: str) -> Encoded:
        """Return one image with its label. Raises KeyError if the shard has no such key."""
        return self._labelled(self._folder.fetch(self._inner(shard), key))

    def identity(self) -> dict:
        """Return the settings and class names that determine keys, splits, shards and labels."""
        held_out = "root" if self.validation_root is None else "validation_root"
        names = "\n".join(self.classes).encode(errors="surrogateescape")
        classes = "numbers" if self.numbered else blake2b(names, digest_size=8).hexdigest()
        return {"name": "image_classes", "validation": held_out, "shard_size": self.shard_size, "classes": classes}

    @cached_property
    def _folder(self) -> ImageFolder:
        return ImageFolder(self.root, 0.0, self.shard_size, self.validation_root)

    def _inner(self, shard: str) -> str:
        return _other_split(shard) if self.validation_root is None else shard

    def _labelled(self, encoded: Encoded) -> Encoded:
        return replace(encoded, label=self.label_of[encoded.key.partition("/")[0]])

    def labels(self, shard: str) -> list[int | None]:
        """Return the labels of the shard's images, in the order of the keys, without reading them."""
        return [self.label_of[key.partition("/")[0]] for key in self.keys(shard)]


def _other_split(shard: str) -> str:
    """Return a shard's name in the other split: a single root is for training in ImageFolder, for validation here."""
    split, _, rest = shard.partition("-")
    return f"{'validation' if split == 'train' else 'train'}-{rest}"


def _labels(root: str, where: str) -> dict[str, int]:
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(f"{where}={root}: no such folder; expected a folder that has one folder of images per class")
    names = sorted(entry.name for entry in os.scandir(base) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(
            f"{where}={root}: contains no class folders; expected {root}/CLASS/IMAGE, such as ImageNet's n01440764"
        )
    if _are_numbers(names):
        return _numbers(names, f"{where}={root}")
    numbers = [name for name in names if NUMBER.fullmatch(name)]
    if numbers != sorted(numbers, key=int):  # sorted as text, 10 comes before 2, which nobody wants
        odd = next(name for name in names if not NUMBER.fullmatch(name))
        raise UserError(
            f"{where}={root}: {len(numbers)} class folders are numbers but '{odd}' is not, so the numbers are neither "
            f"labels nor in order; remove '{odd}', or write all numbers with the same count of digits"
        )
    return {name: label for label, name in enumerate(names)}


def _are_numbers(names: Iterable[str]) -> bool:
    return all(NUMBER.fullmatch(name) for name in names)


def _numbers(names: list[str], where: str) -> dict[str, int]:
    labels: dict[str, int] = {}
    names_by_label: dict[int, str] = {}
    for name in sorted(names, key=int):
        label = int(name)
        if label < 0 or label > LARGEST:
            raise UserError(
                f"{where}: class folder '{name}' is a number, hence a label, and labels are 0 to {LARGEST}; rename it"
            )
        if label in names_by_label:
            other = names_by_label[label]
            raise UserError(f"{where}: class folders '{other}' and '{name}' are the same label; merge them")
        names_by_label[label] = name
        labels[name] = label
    return labels
