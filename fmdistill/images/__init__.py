"""Sources of images, each divided into shards; `build` returns the images of a recipe's source."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any

import numpy as np

from fmdistill.images.cifar100 import Cifar100
from fmdistill.images.digits import Digits
from fmdistill.images.folder import ImageFolder
from fmdistill.images.image_classes import ImageClasses
from fmdistill.images.mix import Mix
from fmdistill.images.picture import DecodeError, Decoding, Picture, decode
from fmdistill.images.picture import read as read_picture
from fmdistill.images.source import CAPTION, SPLITS, Encoded, Source, captions, escape, unescape
from fmdistill.images.tar import Tar
from fmdistill.registry import UserError, bind, convert, typed

__all__ = ["SOURCES", "DecodeError", "Decoding", "Encoded", "Images", "Picture", "Shard", "Source"]
__all__ += ["build", "captions", "check", "decode", "escape", "labels", "undecodable", "unescape"]

SOURCES: dict[str, Callable[..., Source] | str] = {
    "folder": ImageFolder,
    "image_classes": ImageClasses,
    "tar": Tar,
    "photos": "fmdistill.mini.photos:Photos",
    "scenes": "fmdistill.mini.scenes:Scenes",
    "regions": "fmdistill.mini.regions:Regions",
    "captioned": "fmdistill.mini.captioned:Captioned",
    "digits": Digits,
    "cifar100": Cifar100,
    "mix": Mix,
}


@dataclass(frozen=True)
class Shard:
    """A shard of a source; `take` is how many of its first images are used, None for all.

    `keys` are the shard's current keys if its source may change them (see `Source`), else None.
    """

    name: str
    split: str
    take: int | None = None
    keys: Sequence[str] | None = field(default=None, compare=False, repr=False)

    def matches(self, keys: Sequence[str]) -> bool:
        """Return whether a cached shard with `keys`, in order, starts with this shard's images."""
        return self.keys is None or list(keys[: self.take]) == list(self.keys[: self.take])


@dataclass(frozen=True)
class Images:
    """A source, limited to `limit` images per split, and the rules by which its images are decoded.

    The sources of a mix share its limit evenly.
    """

    source: Source
    limit: int | None = None
    decoding: Decoding = Decoding()

    def shards(self) -> list[Shard]:
        """Return the shards in order, training shards first, cut to the limit."""
        names = self.source.shards()
        if self.limit is None:
            return [Shard(name, split, keys=self._keys(name)) for split in SPLITS for name in names.get(split, [])]
        return [shard for split in SPLITS for shard in self._cut(split, names.get(split, []), self.limit)]

    def group(self, shard: str) -> str:
        """Return the name of the mix's source that a shard belongs to; "images" if the source is not a mix."""
        return shard.partition("-")[0] if isinstance(self.source, Mix) else "images"

    def read(self, shard: Shard) -> Iterator[Encoded]:
        """Yield the shard's images in order."""
        yield from islice(self.source.read(shard.name), shard.take)

    def picture(self, encoded: Encoded) -> Picture:
        """Decode an image. Raises DecodeError if that is not possible."""
        return read_picture(encoded.data, self.decoding)

    def decode(self, encoded: Encoded, shard: str) -> np.ndarray:
        """Return the pixels of an image, uint8 (H, W, 3) RGB. Raises UserError if it cannot be decoded."""
        try:
            return self.picture(encoded).pixels
        except DecodeError as error:
            raise undecodable(shard, encoded.key, error) from None

    def identity(self, captions: bool = False) -> dict:
        """Return the settings that determine keys, labels and pixels, and with `captions` the captions too."""
        own = {**self.source.identity(), "decoding": self.decoding.identity()}
        return {**own, "captions": caption_column(self.source)} if captions else own

    def labels(self, shard: Shard) -> list[int | None]:
        """Return the labels of the shard's images, in order."""
        return labels(self.source, shard.name)[: shard.take]

    def _keys(self, shard: str) -> Sequence[str] | None:
        current_keys = getattr(self.source, "current_keys", None)  # optional in a source
        return current_keys(shard) if current_keys else None

    def _cut(self, split: str, names: list[str], limit: int) -> Iterator[Shard]:
        counts: dict[str, dict[str, int]] = {}  # by group and shard; in each group only as many as the limit can need
        for name in names:
            group = counts.setdefault(self.group(name), {})
            if sum(group.values()) < limit:
                group[name] = self.source.count(name)
        left = _shares({group: min(sum(shards.values()), limit) for group, shards in counts.items()}, limit)
        for name in names:
            group = self.group(name)
            if name in counts[group] and left[group] > 0:
                count = counts[group][name]
                yield Shard(name, split, left[group] if count > left[group] else None, self._keys(name))
                left[group] -= count


def caption_column(source: Source) -> Any:
    """Return the name of the column of a source's captions; of a mix, that of each source by name."""
    if isinstance(source, Mix):
        return {name: caption_column(member) for name, member in source.members.items()}
    column = getattr(source, "caption_column", None)  # optional in a source
    return column() if column else CAPTION


def undecodable(shard: str, key: str, error: DecodeError) -> UserError:
    """Return the error that an image cannot be decoded, and why."""
    return UserError(f"{shard}: image '{key}' cannot be decoded: {error}; repair the file or take it out")


def _shares(available: Mapping[str, int], limit: int) -> dict[str, int]:
    shares: dict[str, int] = {}
    # The smallest group first, so that the others can use the rest of its share.
    for group in sorted(available, key=lambda name: available[name]):
        even = -(-(limit - sum(shares.values())) // (len(available) - len(shares)))
        shares[group] = min(available[group], even)
    return shares


def labels(source: Source, shard: str) -> list[int | None]:
    """Return the labels of the shard's images, reading the images if the source has no `labels`."""
    labels_of = getattr(source, "labels", None)  # optional in a source
    return list(labels_of(shard)) if labels_of else [image.label for image in source.read(shard)]


def check(settings: Mapping[str, Any]) -> None:
    """Check the settings of a source, or of all sources of a mix, without touching data."""
    source, _, _ = _bind(settings)
    source()  # touches no data: a source looks for it only when it lists its shards


def build(settings: Mapping[str, Any]) -> Images:
    """Return the images of a recipe's `images` settings; every source takes `limit`, `orientation` and `max_pixels`."""
    source, limit, decoding = _bind(settings)
    return Images(source(), limit, decoding)


def _bind(settings: Mapping[str, Any]) -> tuple[Any, int | None, Decoding]:
    limit = convert(settings.get("limit"), int | None, "images.limit")
    if limit is not None and limit < 1:
        raise UserError(f"images.limit={limit}: expected at least 1, or null for no limit")
    names = [setting.name for setting in fields(Decoding)]
    decoding = Decoding(**typed(Decoding, {name: settings[name] for name in names if name in settings}, "images"))
    if decoding.max_pixels < 1:
        raise UserError(f"images.max_pixels={decoding.max_pixels}: expected at least 1")
    rest = {key: value for key, value in settings.items() if key not in ("limit", *names)}
    return bind(rest, SOURCES, "images"), limit, decoding
