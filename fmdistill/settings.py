"""Settings as plain mappings: names of recipes, methods of studies, and the rules by which settings are merged."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmdistill.registry import UserError, suggest

METHOD = r"\w[\w.+-]*"  # the name of a method, which is also a folder's name


@dataclass(frozen=True)
class RecipeName:
    """The parts of a recipe's name: a file, and optionally a method of the study in it, and settings to change."""

    path: str
    method: str = ""
    settings: tuple[str, ...] = ()


def parse_recipe_name(name: str | Path) -> RecipeName:
    """Parse a recipe's name: PATH, PATH:METHOD, PATH:key=value,key=value or PATH:METHOD,key=value.

    A comma separates settings only if a key and = follow it, so that values may be lists: `train.betas=[1,2],seed=1`.
    """
    path, _, rest = str(name).partition(":")
    if not re.match(rf"{METHOD}(,|=|$)", rest) or os.path.isfile(os.path.expanduser(str(name))):
        return RecipeName(str(name))
    first, *others = re.split(r",(?=[\w.-]+=)", rest)
    return RecipeName(path, "", (first, *others)) if "=" in first else RecipeName(path, first, tuple(others))


def is_override(text: str) -> bool:
    """Return whether an argument is a setting, key=value; a recipe's name with settings in it is not."""
    return "=" in text and ":" not in text.partition("=")[0]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the settings `over` into `base` and return the result; a mapping whose `name` changes is replaced whole.

    Setting one of the alternatives `steps` and `epochs` resets the other to None. The `batch_size` "auto" leaves a
    number as it is and sets `accumulate`.
    """
    merged, over = dict(base), parts_by_memory(over, base)
    for key, alternative in (("steps", "epochs"), ("epochs", "steps")):
        if key in over and alternative in merged and alternative not in over:
            merged[alternative] = None
    for key, value in over.items():
        old = merged.get(key)
        replaced = isinstance(value, Mapping) and isinstance(old, Mapping) and _renamed(old, value)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and not replaced:
            merged[key] = merge(old, value)
        else:
            merged[key] = merge({}, value) if isinstance(value, Mapping) else value
    return merged


def parts_by_memory(train: Mapping[str, Any], base: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace `batch_size` "auto" in the settings `train` by `accumulate` "auto", if `base` has a batch size.

    Raises UserError if `train` sets `accumulate` to a number.
    """
    if train.get("batch_size") != "auto" or "batch_size" not in base:
        return train
    if train.get("accumulate", "auto") != "auto":
        raise UserError(
            f"train.batch_size=auto, train.accumulate={train['accumulate']}: auto chooses train.accumulate; leave one "
            f"of the two out"
        )
    return {**{key: value for key, value in train.items() if key != "batch_size"}, "accumulate": "auto"}


def _renamed(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "name" in new and new["name"] != old.get("name")


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting by its dotted name, such as "train.steps"."""
    flattened: dict[str, Any] = {}
    for key, value in settings.items():
        nested = {f".{name}": leaf for name, leaf in flat(value).items()} if isinstance(value, Mapping) else {"": value}
        flattened.update({f"{key}{name}": leaf for name, leaf in nested.items()})
    return flattened


def parse_methods(stated: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Check the `methods` of the study at `path` and return their settings by name, dotted keys nested."""
    if not isinstance(stated, dict):
        raise UserError(
            f"{path}: methods={stated!r}: expected a mapping of names to settings, such as {{long: {{seed: 1}}}}"
        )
    methods: dict[str, dict[str, Any]] = {}
    for name, settings in stated.items():
        if not re.fullmatch(METHOD, str(name)):
            raise UserError(
                f"{path}: methods.{name}: a name consists of letters, digits and _ . + -, since a folder is named so"
            )
        if not isinstance(settings, dict):
            raise UserError(f"{path}: methods.{name}={settings!r}: expected a mapping of settings, or {{}} for none")
        methods[str(name)] = nested(settings)
    return methods


def nested(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with dotted names, such as {"train.steps": 100}, as nested mappings; paths become texts.

    Of a setting that occurs twice, the last value counts.
    """
    result: dict[str, Any] = {}
    for key, value in (item for mapping in settings for item in mapping.items()):
        *parents, last = str(key).split(".")
        inner = result
        for parent in parents:
            if not isinstance(inner.get(parent), dict):
                inner[parent] = {}
            inner = inner[parent]
        if isinstance(value, Mapping):
            old = inner.get(last)
            inner[last] = nested(old if isinstance(old, dict) else {}, value)
        else:
            inner[last] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return result


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as the arguments of a command line: "train.steps=100", one for each value."""
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for key, value in flat(nested(settings)).items()
    ]


def with_method(
    base: dict[str, Any], methods: Mapping[str, dict[str, Any]], name: str, path: Path, below: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Merge the settings of method `name`, and before them of the methods it extends, into `base`.

    `below` are the methods that extend `name`. Raises UserError if one extends itself or a setting changes nothing.
    """
    own = {key: value for key, value in methods[name].items() if key != "extends"}
    if "extends" in methods[name]:
        parent, below = str(methods[name]["extends"]), (*below, name)
        if parent not in methods or parent in below:
            known = [method for method in methods if method not in below]
            raise UserError(f"{path}: methods.{name}.extends={parent}: no other method.{suggest(parent, known)}")
        base = with_method(base, methods, parent, path, below)
    settings = merge(base, own)
    for key, value in own.items():
        if merge(base, {key: value}) == base:
            raise UserError(f"{path}: methods.{name}.{key}: changes nothing, the method has this value; remove it")
    return settings


def folder_name(settings: Iterable[str]) -> str:
    """Return a folder name for settings in any order, with a hash if the name cannot contain them unchanged."""
    text = "-".join(sorted(settings))
    plain = re.sub(r"[^\w.+-]", "_", text)
    lossless = len(plain) <= 120 and plain == text.replace("=", "_")
    return plain if lossless else f"{plain[:120]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def foreign_names(settings: Any) -> list[str]:
    """Return the components in `settings` that are outside fmdistill, "package.module:Name"."""
    return [name for name in _names(settings) if ":" in name]


def expand_home(value: Any) -> Any:
    """Expand a leading ~ to the user's home folder in each path within a value."""
    if isinstance(value, Mapping):
        return {key: expand_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [expand_home(inner) for inner in value]
    is_path = isinstance(value, str) and value.startswith("~") and "/" in value  # ~ alone is YAML's null
    return os.path.expanduser(value) if is_path else value


def without_null(value: Any) -> Any:
    """Return a mapping without its entries that are null, and any other value as it is."""
    if not isinstance(value, Mapping):
        return value
    return {key: inner for key, inner in value.items() if inner not in (None, "null")}


def _names(settings: Any) -> list[str]:
    if isinstance(settings, Mapping):
        own = [str(settings["name"])] if "name" in settings else []
        return own + [name for value in settings.values() for name in _names(value)]
    if isinstance(settings, list):
        return [name for value in settings for name in _names(value)]
    return []
