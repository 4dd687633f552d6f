"""The manifest: the identity of a cache, written once, before any shard. Another identity is refused."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fmdistill.cache import captions, outputs
from fmdistill.files import write_first
from fmdistill.images import Decoding
from fmdistill.registry import UserError

FORMAT = 2
NAME = "manifest.json"
# The settings that bring back what a cache was made with, by place and value in the manifest, beside the family's own.
SETTINGS = {
    ("teacher.dtype", "fp32"): "teacher.dtype=fp32",
    ("teacher.dtype", "bf16"): "teacher.dtype=bf16",
    ("images.decoding.orientation", "apply"): "images.orientation=apply",
    ("images.decoding.orientation", "ignore"): "images.orientation=ignore",
}


FIELDS: Mapping[str, Callable[[Any], bool]] = {  # what readers rely on; the rest is compared only
    "family": lambda value: isinstance(value, str),
    "teacher": lambda value: isinstance(value, dict) and isinstance(value.get("preprocess"), dict),
    "outputs": outputs.is_sound,
    "head": lambda value: isinstance(value, bool),
    "images": lambda value: isinstance(value, dict),
}


def claim(root: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Create `root`/manifest.json with `identity`, or check that it holds the same identity; return it.

    Raises UserError if the folder holds another cache, with the settings that would continue it.
    """
    root.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps({"format": FORMAT, **identity}))
    if not (root / NAME).exists():
        write_first(root / NAME, json.dumps(wanted, indent=1, sort_keys=True))
    stored = read(root)
    differences = list(_differences(stored, wanted))
    if differences:
        shown = "; ".join(
            f"{place} is {_short(was)} there and {_short(now)} here" for place, was, now in differences[:4]
        )
        raise UserError(f"{root}: this cache is another one: {shown}. {_way_out(stored, differences)}")
    return stored


def read(root: Path) -> dict[str, Any]:
    """Return the manifest of the cache at `root`."""
    path = root / NAME
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{root}: no cache here (no {NAME}); make it with `fmdistill cache RECIPE`") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a manifest ({error}); delete the file to have it written anew") from None
    if not isinstance(manifest, dict):
        kind = type(manifest).__name__
        raise UserError(f"{path}: not a manifest (a {kind}); delete the file to have it written anew")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {manifest.get('format')!r} is not {FORMAT}; it needs another fmdistill version"
        )
    for name, sound in FIELDS.items():
        if name not in manifest or not sound(manifest[name]):
            value = _short(manifest.get(name))
            raise UserError(f"{path}: damaged, its '{name}' is {value}; delete the file to have it written anew")
    return manifest


def check_decoding(root: Path, manifest: Mapping[str, Any], decoding: Decoding) -> None:
    """Raise a UserError if the teacher saw the images decoded by other rules than a student would."""
    stored = manifest["images"].get("decoding")
    differences = list(_differences(stored, decoding.identity(), "images.decoding"))
    if differences:
        where, was, now = differences[0]
        raise UserError(
            f"{root}: the teacher saw the images with {where} {_short(was)}, here it is {_short(now)}. "
            f"{_way_out(manifest, differences)}"
        )


def identity_hash(manifest: Mapping[str, Any]) -> str:
    """Return a short hash of the manifest, by which a sidecar names the cache that it belongs to."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def _differences(stored: Any, wanted: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the place of every difference, such as "teacher.dtype", with the stored and the wanted value."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted({*stored, *wanted}):
            yield from _differences(stored.get(key), wanted.get(key), f"{place}.{key}" if place else key)
    elif stored != wanted:
        yield place, stored, wanted


def _way_out(stored: Mapping[str, Any], differences: list[tuple[str, Any, Any]]) -> str:
    settings = list(dict.fromkeys(_setting(stored, place, value) for place, value, _ in differences))
    # A setting that brings back half of what the cache was made with would only lead to the next refusal.
    again = f"Go on with it by {' '.join(map(str, settings))}; or choose" if all(settings) else "Choose"
    return f"{again} another cache.root=FOLDER, or delete this one"


def _setting(stored: Mapping[str, Any], place: str, value: Any) -> str | None:
    """Return the setting that gives the `value` that is stored at `place`; None if there is none."""
    if (place, str(value)) in SETTINGS:
        return SETTINGS[place, str(value)]
    section, _, name = place.partition(".")
    if section == "outputs" and name.endswith(".codec.train"):
        codec = outputs.chosen_codec(outputs.from_json(stored["outputs"]))
        return f"cache.codec={codec.name} cache.trim={str(codec.trim).lower()}"
    if place == "images.captions" or section == "outputs" and "." not in name and captions.stored([name]):
        return f"teacher.captions={captions.stored(stored['outputs'])}"
    if section == "outputs" and "." not in name:  # an output that one side lacks: the similarities of a map
        similarity = any("of" in entry for entry in stored["outputs"].values())
        own = name.removesuffix(outputs.similarity_name(""))
        return f"cache.similarity={str(similarity).lower()}" if own != name and own in stored["outputs"] else None
    if section == "teacher":
        from fmdistill import teachers  # here, since a family loads torch

        if stored["family"] in teachers.FAMILIES:
            return teachers.load_family(stored["family"]).matching_settings.get((place, str(value)))
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:60]}..."
