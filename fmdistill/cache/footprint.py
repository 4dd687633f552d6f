"""Estimate the disk space of a cache from the files of a small cache of the same recipe."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fmdistill.cache import seal
from fmdistill.cache.codec import CODECS, Codec, stacked
from fmdistill.cache.outputs import chosen_codec, codecs_by, codecs_of
from fmdistill.cache.reader import Cache
from fmdistill.cache.writer import cut
from fmdistill.images import Images, Shard
from fmdistill.images.source import SPLITS
from fmdistill.logs import log
from fmdistill.teachers.output import Output

COUNTED = 64  # shards of a split whose images are counted; of more shards so many are a sample
BLOCK, END = 512, 1024 + seal.SIZE  # bytes: a tar's unit, and its seal and end


@dataclass(frozen=True)
class Disk:
    """Bytes that the whole cache takes, and where it will lie."""

    root: Path
    codec: str  # label of that of the training images
    tars: Mapping[str, int]  # by the label of each codec that the training images could have
    sidecars: int
    beside: int  # manifest and the teacher's head
    held: Sequence[tuple[str, float, float]]  # split, images and tar's bytes of each shard, largest first
    missing_shards: int
    missing: int  # bytes of the shards that are not cached yet, with the recipe's codec
    free: int
    limit: int  # the largest images.limit whose cache fits


def count(images: Images, shards: Sequence[Shard]) -> tuple[list[float], bool]:
    """Return the images of each shard and whether all were counted; a shard that was not gets its split's mean."""
    known: dict[str, float] = {}
    whole = True
    for split in SPLITS:
        open_ended = [s for s in shards if s.split == split and s.take is None]
        places = np.linspace(0, len(open_ended) - 1, min(COUNTED, len(open_ended))).round().astype(int)
        counted = {open_ended[i].name: float(images.source.count(open_ended[i].name)) for i in places}
        whole &= len(counted) == len(open_ended)
        mean = sum(counted.values()) / max(1, len(counted))
        known |= {s.name: counted.get(s.name, mean) for s in open_ended}
    return [known[s.name] if s.take is None else float(s.take) for s in shards], whole


def tar_bytes(codecs: Mapping[str, Codec], outputs: Mapping[str, Output], images: float) -> float:
    """Return the bytes of a shard's tar by the codecs' own `size`, one codec for each output."""
    total = float(END)
    for name, output in outputs.items():
        shape, codec = output.shape, codecs[name]
        total += codec.size((round(images), *shape)) if output.is_vector else images * codec.size(shape)
    return total


def estimate_disk(
    root: Path, small: Cache, shards: Sequence[Shard], by_name: Mapping[str, float], missing: Sequence[Shard]
) -> Disk:
    """Return the bytes of the cache of `shards` at `root`, each figure scaled from the files of the `small` cache.

    `by_name` are the images of each shard. The tars are exact for codecs whose `size` is, the sidecars within 10 %.
    """
    label = chosen_codec(small.outputs).label
    codecs = {split: codecs_of(small.outputs, split) for split in SPLITS}
    ratios = {split: _written(small, split, codecs[split]) for split in SPLITS}

    def tars(some: Sequence[Shard], split: str, codecs: Mapping[str, Codec], ratio: float) -> float:
        counts = [by_name[s.name] for s in some if s.split == split]
        return sum(END + ratio * (tar_bytes(codecs, small.outputs, images) - END) for images in counts)

    def chosen(some: Sequence[Shard], split: str) -> float:
        return tars(some, split, codecs[split], ratios[split])

    def sidecars(some: Sequence[Shard]) -> float:
        sizes = {split: _sidecar_bytes(small, split) for split in SPLITS}
        return sum(sizes[s.split][0] + sizes[s.split][1] * by_name[s.name] for s in some)

    exact = chosen(shards, "validation")
    by_codec = {label: round(exact + chosen(shards, "train"))}
    tried = dict(CODECS)
    if any(output.tokens == "image" for output in small.outputs.values()):
        trimmed = replace(chosen_codec(small.outputs), trim=True)
        tried[trimmed.label] = trimmed
    for name, codec in tried.items():
        own = codecs_by(codec, small.outputs)
        if name not in by_codec and (ratio := _encoded(small, own)) is not None:
            by_codec[name] = round(exact + tars(shards, "train", own, ratio))
    parts = {split: chosen(shards, split) + sidecars([s for s in shards if s.split == split]) for split in SPLITS}
    left = sum(chosen(missing, split) for split in SPLITS) + sidecars(missing)
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    images = {split: sum(by_name[s.name] for s in shards if s.split == split) for split in SPLITS}
    return Disk(
        root=root,
        codec=label,
        tars=by_codec,
        sidecars=round(sidecars(shards)),
        beside=sum(p.stat().st_size for p in small.root.iterdir() if p.stem in ("manifest", "head")),
        held=sorted(
            ((s.split, by_name[s.name], chosen([s], s.split)) for s in shards),
            key=lambda shard: shard[1:],
            reverse=True,
        ),
        missing_shards=len(missing),
        missing=round(left),
        free=free,
        limit=_fitting(free + sum(parts.values()) - left, parts, images),
    )


def _fitting(room: float, parts: Mapping[str, float], images: Mapping[str, float]) -> int:
    """Return the largest limit of images, the same for each split, whose cache fits in `room` bytes; at least 1."""
    held = sorted((images[split], parts[split] / images[split]) for split in parts if images[split])
    for place, (count, _) in enumerate(held):
        before = sum(number * each for number, each in held[:place])  # splits that are smaller than the limit
        limit = 0.95 * (room - before) / sum(each for _, each in held[place:])
        if limit <= count:
            return max(1, int(limit))
    return max(1, int(held[-1][0]))


def _written(small: Cache, split: str, codecs: Mapping[str, Codec]) -> float:
    """Return the bytes of the small cache's tars, relative to what the codecs' `size` says."""
    readers = small.shards[split]
    nominal = sum(tar_bytes(codecs, small.outputs, len(reader.samples)) - END for reader in readers)
    return sum(reader.path.stat().st_size - END for reader in readers) / nominal if nominal else 1.0


def _encoded(small: Cache, codecs: Mapping[str, Codec]) -> float | None:
    """Return the bytes of the small cache's maps in these codecs, as `_written`; None if a codec cannot hold them."""
    written = nominal = 0
    # Validation is exact, so it tells what a codec holds; what trimming leaves out are training images' padded tokens.
    trims = any(codec.trim for codec in codecs.values())
    for reader in small.shards["train" if trims or not small.shards["validation"] else "validation"]:
        for index, sample in enumerate(reader.samples):
            valid = small.preprocess.valid(torch.tensor([sample["resized"]]))[0].numpy()
            for name, array in reader.read(index).items():
                if stacked(array.shape):
                    continue
                own = codecs[name]
                try:
                    written += BLOCK + -(-len(own.encode(cut(array, own, valid))) // BLOCK) * BLOCK
                except OverflowError as error:
                    log.warning("%s: %s", reader.name, error)
                    return None
                nominal += own.size(array.shape)
    return written / nominal if nominal else 1.0


def _sidecar_bytes(small: Cache, split: str) -> tuple[float, float]:
    """Return the bytes of a sidecar without its samples, and those of a sample."""
    readers = small.shards[split]
    if not readers:
        return 0.0, 0.0
    texts = [reader.path.with_suffix(".json").read_text() for reader in readers]
    samples = sum(len(json.dumps(json.loads(text)["samples"])) for text in texts)
    images = sum(len(reader.samples) for reader in readers)
    return (sum(map(len, texts)) - samples) / len(readers), samples / max(1, images)
