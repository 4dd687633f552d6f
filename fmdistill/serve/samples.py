"""Offer images to start with: the run's own validation images, and whole photographs that ship with the package."""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import PIL.Image

from fmdistill.cache import Cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate.subjects import in_turn
from fmdistill.images import SOURCES
from fmdistill.images.numbered import png
from fmdistill.images.picture import decode
from fmdistill.logs import log
from fmdistill.registry import UserError, resolve
from fmdistill.serve.pictures import Place
from fmdistill.serve.subjects import OpenedRuns

PHOTOGRAPHS = ("chelsea", "coffee", "flower", "coins")  # no teacher or student of the package was trained on them
READER = {"photograph": "fmdistill.mini.photos:photograph"}
OWN = 12  # validation images to offer
GOLDEN = 0.6180339887  # its multiples, modulo 1, are spread evenly
THUMBNAIL = 144  # pixels of its height


@dataclass(frozen=True)
class OfferedImage:
    """An image to start with: `read` returns its bytes, `place` is where the cache has it, `label` what it shows."""

    name: str
    group: str
    read: Callable[[], bytes]
    place: Place | None = None
    label: int | None = None


def gather(opened: OpenedRuns) -> list[OfferedImage]:
    """Return the samples in the order to show them: whole photographs first, unless the run had its own images."""
    own = _own(opened.cache) if opened.cache is not None else []
    packaged = [OfferedImage(name, "photographs", functools.partial(_photograph, name)) for name in PHOTOGRAPHS]
    if opened.family == "clip" or not _is_packaged(opened.recipe.images):
        return [*own, *packaged]
    return [*packaged, *own]


def thumbnail(data: bytes) -> bytes:
    """Return a small JPEG of an encoded image."""
    image = PIL.Image.fromarray(decode(data))
    image.thumbnail((3 * THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return file.getvalue()


def _own(cache: Cache) -> list[OfferedImage]:
    """Return validation images of the cache, photographs first; none if the images are not at hand."""
    try:
        data = CachedImages(cache, "validation")
        groups: dict[str, list[Place]] = {}
        for place in in_turn(data):
            groups.setdefault(data.shards[place[0]].group, []).append(place)
        chosen = [place for name in sorted(groups, key=_order) for place in _spread(groups[name], OWN // len(groups))]
        if chosen:
            data.encoded(*chosen[0])  # whether the images are where they were
        return [_sample(data, place) for place in chosen]
    except (UserError, OSError) as error:
        log.warning("none of the run's own images is shown: %s", error)
        return []


def _sample(data: CachedImages, place: Place) -> OfferedImage:
    shard, index = place
    reader = data.shards[shard]
    record = reader.samples[index]
    group = f"validation: {reader.group}" if reader.group != "images" else "validation"
    return OfferedImage(record["key"], group, lambda: data.encoded(shard, index).data, place, record.get("label"))


def _order(group: str) -> tuple[bool, str]:
    return group != "photos", group


def _spread(places: list[Place], count: int) -> list[Place]:
    """Return `count` of the places, spread evenly without a period, since a source's photographs or classes recur."""
    if len(places) <= count:
        return places
    return [places[index] for index in sorted({int(i * GOLDEN % 1 * len(places)) for i in range(count)})]


def _is_packaged(images: dict[str, Any]) -> bool:
    """Return whether a recipe's images ship with the package or are drawn by it."""
    parts = images["sources"].values() if images.get("name") == "mix" else [images]
    return all(isinstance(SOURCES.get(part.get("name", "")), str) for part in parts)


def _photograph(name: str) -> bytes:
    return png(PIL.Image.fromarray(resolve("photograph", READER, "samples")(name)))
