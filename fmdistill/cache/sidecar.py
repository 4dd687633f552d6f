"""The sidecar of a shard: the place of every member in its tar and the outputs' statistics; written last.

{"checksum": the sha256's first half of all that follows, "identity": ..., "take": ..., "split": ..., "codecs": ...,
"bytes": of the tar, "sha256": of the tar, "seal": the tar's, "samples": [...], "failed": [...], "statistics": {...}}.
Reading checks all of it, so that no reader meets a missing field, an offset outside the tar, or an impossible size.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fmdistill.cache import seal
from fmdistill.cache.codec import known
from fmdistill.cache.outputs import StoredOutput, codecs_of
from fmdistill.cache.store import Store
from fmdistill.images import Shard
from fmdistill.images.source import SPLITS

CHECKSUM = '{{"checksum": "{}", '
LENGTH = len(CHECKSUM.format("0" * 32))


def write(fields: Mapping[str, Any]) -> str:
    """Return the sidecar's text."""
    rest = json.dumps(fields)[1:]
    return CHECKSUM.format(_checksum(rest)) + rest


def read(path: Path) -> dict[str, Any] | None:
    """Return the sidecar at `path`; None if it is missing, damaged, or describes what no tar can hold."""
    try:
        text = path.read_text()
        fields = json.loads(text)
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    fields.pop("checksum", None)
    if text[:LENGTH] != CHECKSUM.format(_checksum(text[LENGTH:])):
        return None
    whole = _has(fields, SIDECAR) and all(_has(failure, FAILED) for failure in fields["failed"])
    return fields if whole and all(_sound(sample, fields["bytes"]) for sample in fields["samples"]) else None


class Finished(NamedTuple):
    """A finished shard: the local path of its tar, which a bucket may not have downloaded yet, and its sidecar."""

    tar: Path
    fields: dict[str, Any]


def finished(store: Store, shard: Shard, identity: str, outputs: Mapping[str, StoredOutput]) -> Finished | None:
    """Return the finished shard that holds all that `shard` asks for, stored as `outputs` state; else None.

    None also if the sidecar belongs to another cache, to other images, or by length and seal to another tar. A shard
    whose split has changed is not finished if the codecs of the splits differ.
    """
    labels = {name: codec.label for name, codec in codecs_of(outputs, shard.split).items()}
    for path, with_tar in store.sidecars(shard.name):
        fields, tar = read(path), path.with_suffix(".tar")
        if fields is None or fields["identity"] != identity or fields["codecs"] != labels:
            continue
        sealed = _sealed(tar)
        if sealed is None and with_tar or sealed not in (None, (fields["bytes"], fields["seal"])):
            continue
        enough = fields["take"] is None or (shard.take is not None and fields["take"] >= shard.take)
        if enough and shard.matches(_keys(fields)):
            return Finished(tar, fields)
    return None


def _sealed(tar: Path) -> tuple[int, str] | None:
    try:
        return seal.read(tar)
    except FileNotFoundError:
        return None


def _keys(fields: Mapping[str, Any]) -> list[str]:
    """Return the keys of all images that the teacher was given, in the source's order."""
    images = sorted([*fields["samples"], *fields["failed"]], key=lambda image: image["index"])
    return [image["key"] for image in images]


def _checksum(rest: str) -> str:
    return hashlib.sha256(rest.encode()).hexdigest()[:32]


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_count(side) and side > 0 for side in value)


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _mappings(value: Any) -> bool:
    return _mapping(value) and all(map(_mapping, value.values()))


Fields = Mapping[str, Callable[[Any], bool]]
SIDECAR: Fields = {
    "identity": _text,
    "take": lambda value: value is None or _count(value),
    "split": lambda value: value in SPLITS,
    "codecs": lambda value: _mapping(value) and all(_text(label) and known(label) for label in value.values()),
    "bytes": _count,
    "sha256": _text,
    "seal": _text,
    "samples": _list,
    "failed": _list,
    "statistics": _mappings,
}
SAMPLE: Fields = {
    "key": _text,
    "index": _count,
    "image": _text,
    "original": _size,
    "resized": _size,
    "outputs": _mapping,
}
FAILED: Fields = {"key": _text, "index": _count, "problem": _text}
MEMBER: Fields = {"offset": _count, "size": _count, "crc32": _count}


def _has(value: Any, fields: Fields, *optional: str) -> bool:
    """Return whether `value` is a mapping of exactly these fields, each sound, and perhaps the `optional` ones."""
    return (
        isinstance(value, dict)
        and value.keys() - set(optional) == fields.keys()
        and all(sound(value[name]) for name, sound in fields.items())
    )


def _sound(sample: Any, length: int) -> bool:
    if not _has(sample, SAMPLE, "label") or not (sample.get("label") is None or _count(sample["label"])):
        return False
    return all(
        _has(member, MEMBER, "shape")
        and member["offset"] + member["size"] <= length
        and ("shape" not in member or (_list(member["shape"]) and all(map(_count, member["shape"]))))
        for member in sample["outputs"].values()
    )
