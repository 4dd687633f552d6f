"""Images: where they come from, in shards. `build` makes the source that a recipe names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any

import numpy as np

from fmdistill.images.cifar100 import Cifar100
from fmdistill.images.digits import Digits
from fmdistill.images.folder import Folder
from fmdistill.images.image_classes import ImageClasses
from fmdistill.images.mix import Mix
from fmdistill.images.picture import DecodeError, Decoding, Picture, decode
from fmdistill.images.picture import read as read_picture
from fmdistill.images.source import SPLITS, Encoded, Source, captions, escape, unescape
from fmdistill.images.tar import Tar
from fmdistill.registry import UserError, bind, convert, typed

__all__ = ["SOURCES", "DecodeError", "Decoding", "Encoded", "Images", "Picture", "Shard", "Source"]
__all__ += ["build", "captions", "check", "decode", "escape", "labels", "undecodable", "unescape"]

SOURCES: dict[str, Callable[..., Source] | str] = {
    "folder": Folder,
    "image_classes": ImageClasses,
    "tar": Tar,
    "photos": "fmdistill.mini.photos:Photos",
    "scenes": "fmdistill.mini.scenes:Scenes",
    "captioned": "fmdistill.mini.captioned:Captioned",
    "digits": Digits,
    "cifar100": Cifar100,
    "mix": Mix,
}


@dataclass(frozen=True)
class Shard:
    """One shard of a source; `take` is how many of its first images count, None for all.

    `keys` are what it holds now, of a source that may come to hold others under the shard's name; else None.
    """

    name: str
    split: str
    take: int | None = None
    keys: Sequence[str] | None = field(default=None, compare=False, repr=False)

    def is_of(self, keys: Sequence[str]) -> bool:
        """Return whether a shard of these keys, in their order, holds what this one asks for."""
        return self.keys is None or list(keys[: self.take]) == list(self.keys[: self.take])


@dataclass(frozen=True)
class Images:
    """A source, cut to `limit` images per split, and how its images are decoded.

    A mix's limit is shared evenly among its sources.
    """

    source: Source
    limit: int | None = None
    decoding: Decoding = Decoding()

    def shards(self) -> list[Shard]:
        """Return the shards in their order, training first; those in which the limit falls are cut."""
        names = self.source.shards()
        if self.limit is None:
            return [Shard(name, split, keys=self._keys(name)) for split in SPLITS for name in names.get(split, [])]
        return [shard for split in SPLITS for shard in self._cut(split, names.get(split, []), self.limit)]

    def group(self, shard: str) -> str:
        """Return the source of a mix that the shard of this name belongs to; "images" where there is one source."""
        return shard.partition("-")[0] if isinstance(self.source, Mix) else "images"

    def read(self, shard: Shard) -> Iterator[Encoded]:
        """Yield the shard's images in order."""
        yield from islice(self.source.read(shard.name), shard.take)

    def picture(self, encoded: Encoded) -> Picture:
        """Decode one of the images; DecodeError if that is not possible."""
        return read_picture(encoded.data, self.decoding)

    def decode(self, encoded: Encoded, shard: str) -> np.ndarray:
        """Return the pixels of an image that has to be there, uint8 (H, W, 3) RGB; UserError that names it if not."""
        try:
            return self.picture(encoded).pixels
        except DecodeError as error:
            raise undecodable(shard, encoded.key, error) from None

    def identity(self) -> dict:
        """Return what determines keys, labels and pixels."""
        return {**self.source.identity(), "decoding": self.decoding.identity()}

    def labels(self, shard: Shard) -> list[int | None]:
        """Return the labels of the shard's images, in order."""
        return labels(self.source, shard.name)[: shard.take]

    def _keys(self, shard: str) -> Sequence[str] | None:
        listed = getattr(self.source, "listed", None)  # only some have it
        return listed(shard) if listed else None

    def _cut(self, split: str, names: list[str], limit: int) -> Iterator[Shard]:
        counts: dict[str, dict[str, int]] = {}  # by group and shard; of each group what the limit can need at most
        for name in names:
            group = counts.setdefault(self.group(name), {})
            if sum(group.values()) < limit:
                group[name] = self.source.count(name)
        left = _shares({group: min(sum(held.values()), limit) for group, held in counts.items()}, limit)
        for name in names:
            group = self.group(name)
            if name in counts[group] and left[group] > 0:
                count = counts[group][name]
                yield Shard(name, split, left[group] if count > left[group] else None, self._keys(name))
                left[group] -= count


def undecodable(shard: str, key: str, error: DecodeError) -> UserError:
    """Return the error that an image cannot be decoded, and why."""
    return UserError(f"{shard}: image '{key}' cannot be decoded: {error}; repair the file or take it out")


def _shares(held: Mapping[str, int], limit: int) -> dict[str, int]:
    shares: dict[str, int] = {}
    # the smallest first, so that what it lacks of its share goes to the others
    for group in sorted(held, key=lambda name: held[name]):
        even = -(-(limit - sum(shares.values())) // (len(held) - len(shares)))
        shares[group] = min(held[group], even)
    return shares


def labels(source: Source, shard: str) -> list[int | None]:
    """Return the labels of the shard's images, which are read if the source does not know them otherwise."""
    known = getattr(source, "labels", None)  # only some have it
    return list(known(shard)) if known else [image.label for image in source.read(shard)]


def check(settings: Mapping[str, Any]) -> None:
    """Bind the source's settings, and those of a mix's sources, without touching data."""
    source, _, _ = _bind(settings)
    source()  # a source looks for its data when it lists, not when it is made


def build(settings: Mapping[str, Any]) -> Images:
    """Return the images that a recipe's `images` names; `limit`, `orientation` and `max_pixels` fit every source."""
    source, limit, decoding = _bind(settings)
    return Images(source(), limit, decoding)


def _bind(settings: Mapping[str, Any]) -> tuple[Any, int | None, Decoding]:
    limit = convert(settings.get("limit"), int | None, "images.limit")
    if limit is not None and limit < 1:
        raise UserError(f"images.limit={limit}: expected at least 1, or null for no limit")
    names = [each.name for each in fields(Decoding)]
    decoding = Decoding(**typed(Decoding, {name: settings[name] for name in names if name in settings}, "images"))
    if decoding.max_pixels < 1:
        raise UserError(f"images.max_pixels={decoding.max_pixels}: expected at least 1")
    rest = {key: value for key, value in settings.items() if key not in ("limit", *names)}
    return bind(rest, SOURCES, "images"), limit, decoding
