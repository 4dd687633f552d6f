"""State what a cache stores of each output of its teacher: shape, tokens, and the codec of each split."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fmdistill import recipe as recipes
from fmdistill.cache.codec import CODECS, EXACT, Codec, known, named
from fmdistill.images.source import SPLITS
from fmdistill.registry import UserError
from fmdistill.teachers.output import Output

SIMILARITY = "fp16"  # the codec of similarities in every split: they lie between -1 and 1
AS_MAPS, WITH_VECTORS = "int8", "fp16"  # what "auto" means


@dataclass(frozen=True)
class StoredOutput(Output):
    """One output as a cache stores it, with the codec of each split."""

    codecs: Mapping[str, Codec] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the output's entry in a manifest."""
        entry: dict[str, Any] = {
            "shape": list(self.shape),
            "tokens": self.tokens,
            "codec": {split: codec.label for split, codec in self.codecs.items()},
        }
        return entry if self.of is None else {**entry, "of": self.of}


def stored(outputs: Mapping[str, Output], settings: recipes.CacheSettings) -> dict[str, StoredOutput]:
    """Return how a cache with these settings stores a teacher's outputs.

    Validation is always exact and whole. `trim` concerns maps of padded images, and similarities stay whole.
    """
    train = codecs_by(replace(CODECS[chosen(settings.codec, outputs)], trim=settings.trim), outputs)
    validation = codecs_by(CODECS[EXACT], outputs)
    return {
        name: StoredOutput(
            output.shape, output.tokens, output.of, {"train": train[name], "validation": validation[name]}
        )
        for name, output in outputs.items()
    }


def codecs_by(codec: Codec, outputs: Mapping[str, Output]) -> dict[str, Codec]:
    """Return the codec of each output if `codec` is the one that is chosen: similarities have their own."""
    return {
        name: CODECS[SIMILARITY]
        if output.of is not None
        else replace(codec, trim=codec.trim and output.tokens == "image")
        for name, output in outputs.items()
    }


def chosen(setting: str, outputs: Mapping[str, Output]) -> str:
    """Return the codec that `cache.codec` means for a teacher of these outputs.

    "auto" is int8 for a teacher of maps alone: the smallest codec whose masks are within a point of the exact ones',
    and by which no student was seen to lose (docs/results.md). A teacher that gives vectors too stays in fp16.
    """
    if setting != "auto":
        return setting
    return WITH_VECTORS if any(output.is_vector for output in outputs.values()) else AS_MAPS


def with_similarities(outputs: Mapping[str, Output]) -> dict[str, Output]:
    """Return the outputs with the similarities of each map beside it; UserError if a name is taken."""
    maps = {name: output for name, output in outputs.items() if not output.is_vector}
    added = {
        similarity_name(name): Output((2, *output.shape[1:]), output.tokens, of=name) for name, output in maps.items()
    }
    if taken := outputs.keys() & added.keys():
        raise UserError(f"teacher: its output '{taken.pop()}' is named as those of cache.similarity are; rename it")
    return {**outputs, **added}


def similarity_name(output: str) -> str:
    """Return the name under which the similarities of a map are stored."""
    return f"{output}_similarity"


def to_json(outputs: Mapping[str, StoredOutput]) -> dict[str, Any]:
    """Return a manifest's "outputs"."""
    return {name: output.to_json() for name, output in outputs.items()}


def from_json(entries: Mapping[str, Any]) -> dict[str, StoredOutput]:
    """Return the outputs that a manifest's "outputs", already checked by `is_sound`, describe."""
    return {
        name: StoredOutput(
            tuple(entry["shape"]),
            entry["tokens"],
            entry.get("of"),
            {split: named(label) for split, label in entry["codec"].items()},
        )
        for name, entry in entries.items()
    }


def is_sound(entries: Any) -> bool:
    """Return whether `entries` are what `to_json` writes."""
    return isinstance(entries, dict) and all(map(_is_sound, entries.values()))


def _is_sound(entry: Any) -> bool:
    if not isinstance(entry, dict) or not {"shape", "tokens", "codec"} <= entry.keys():
        return False
    shape, labels = entry["shape"], entry["codec"]
    sides = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
    if not sides or not isinstance(labels, dict) or not isinstance(entry.get("of", ""), str):
        return False
    kind = entry["tokens"] is None if len(shape) == 1 else entry["tokens"] in ("image", "all") and len(shape) == 3
    return kind and all(isinstance(labels.get(split), str) and known(labels[split]) for split in SPLITS)


def chosen_codec(outputs: Mapping[str, StoredOutput]) -> Codec:
    """Return the training codec that was chosen for a cache of these outputs, with `trim` if any of them has it."""
    codecs = [output.codecs["train"] for output in outputs.values() if output.of is None]
    return next((codec for codec in codecs if codec.trim), codecs[0])


def codecs_of(outputs: Mapping[str, StoredOutput], split: str) -> dict[str, Codec]:
    """Return the codec of each output in the shards of one split."""
    return {name: output.codecs[split] for name, output in outputs.items()}
