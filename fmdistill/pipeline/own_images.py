"""Look at a user's images for a new recipe: which source reads them, how many they are, which are held out."""

import glob
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmdistill import images
from fmdistill.cache import footprint
from fmdistill.images.folder import ImageFolder, by_suffix, validation_share
from fmdistill.images.source import SPLITS
from fmdistill.registry import UserError, suggest

SHARE, MOST = 0.1, 500  # images held out for validation: this share of them, and at most so many
SOURCES = ("folder", "tar", "image_classes")


@dataclass(frozen=True)
class OwnImages:
    """A user's images: the settings of their source, comments on them by dotted name, and the numbers of images."""

    settings: dict[str, Any]
    train: int
    validation: int
    text: str  # how many, of which formats, and where
    labelled: bool = False  # whether the source has the labels or captions that a recipe's own protocols need
    comments: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How many images there are, as text."""
        return f"{self.train + self.validation:,}"


def describe(stated: Mapping[str, Any]) -> OwnImages:
    """Count the images that the settings name. Raises UserError if there are none, or none to hold out."""
    settings = dict(stated)
    root = settings.get("root")
    if not root:
        raise UserError("images.root: not set; name the folder of your images, images.root=/data/mine")
    if "name" not in settings:
        settings = {"name": "tar" if _has_tars(str(root)) else "folder", **settings}
    if settings["name"] not in SOURCES:
        raise UserError(f"images.name={settings['name']}: not a source of your own images.{suggest('', SOURCES)}")
    return {"folder": _folder, "tar": _tar, "image_classes": _classes}[settings["name"]](settings)


def _folder(settings: dict[str, Any]) -> OwnImages:
    root, comments = str(settings["root"]), {}
    whole = ImageFolder(root, validation=0.0)
    keys = [key for shard in whole.shards()["train"] for key in whole.keys(shard)]
    formats = Counter(os.path.splitext(key)[1][1:].lower() for key in keys)
    if "validation" not in settings and "validation_root" not in settings:
        if len(keys) < 2:
            raise UserError(f"images.root={root}: contains one image; at least 2 are needed, one to train on")
        held_out = min(MOST, max(2 if len(keys) > 3 else 1, round(len(keys) * SHARE)))  # a floor compares two images
        settings["validation"] = validation_share(keys, held_out)
        comments["images.validation"] = f"holds out {held_out} of the {len(keys):,} images, by their names"
    train, validation = _totals(settings)[0]
    kinds = f".{next(iter(formats))}" if len(formats) == 1 and "" not in formats else by_suffix(formats)
    text = f"{len(keys):,} images ({kinds}) in {root}"
    return OwnImages(settings, train, validation, text, comments=comments)


def _classes(settings: dict[str, Any]) -> OwnImages:
    if "validation_root" not in settings:
        raise UserError(
            "images.validation_root: not set; name the class folders for validation, or set images.name=folder, which "
            "holds out a share of the images and ignores the classes"
        )
    (train, validation), _ = _totals(settings)
    where = f"{settings['root']} and {settings['validation_root']}"
    return OwnImages(settings, train, validation, f"{train + validation:,} images in class folders, {where}", True)


def _tar(settings: dict[str, Any]) -> OwnImages:
    root, comments = str(settings["root"]), {}
    if not settings.get("train") or not settings.get("validation"):
        tars = sorted(os.path.relpath(path, root) for path in glob.glob(os.path.join(glob.escape(root), "*.tar")))
        if len(tars) < 2:
            raise UserError(
                f"images.root={root}: contains {len(tars)} tars; at least 2 are needed, one of them for validation. "
                f"Or name them: images.train=A.tar images.validation=B.tar"
            )
        settings["train"], settings["validation"] = _pattern(tars[:-1]), tars[-1]
        comments["images.validation"] = f"the last of {len(tars)} tars"
    (train, validation), counted = _totals(settings)
    about = "" if counted else "about "
    return OwnImages(
        settings, train, validation, f"{about}{train + validation:,} images in tars, {root}", True, comments
    )


def _pattern(tars: list[str]) -> list[str] | str:
    """Return the tars, or braces such as sa_{000020..000029}.tar if their names are consecutive numbers."""
    prefix = os.path.commonprefix(tars).rstrip("0123456789")
    numbers = [name[len(prefix) :].removesuffix(".tar") for name in tars]
    if len(tars) > 1 and all(number.isdigit() for number in numbers):
        first, last, width = int(numbers[0]), int(numbers[-1]), len(numbers[0])
        if numbers == [f"{number:0{width}d}" for number in range(first, last + 1)]:
            return f"{prefix}{{{numbers[0]}..{numbers[-1]}}}.tar"
    return tars


def _has_tars(root: str) -> bool:
    return Path(root).expanduser().is_dir() and any(Path(root).expanduser().glob("*.tar"))


def _totals(settings: Mapping[str, Any]) -> tuple[tuple[int, int], bool]:
    """Return the images for training and for validation, and whether all shards were counted."""
    built = images.build(settings)
    shards = built.shards()
    counts, counted = footprint.count(built, shards)
    train, validation = (
        round(sum(count for count, shard in zip(counts, shards, strict=True) if shard.split == split))
        for split in SPLITS
    )
    return (train, validation), counted
