"""Settings as plain mappings: how a recipe is named, what a study's methods are, and what is laid on top of what."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmdistill.registry import UserError, suggest

METHOD = r"\w[\w.+-]*"  # a method's name is also a folder's


@dataclass(frozen=True)
class Reference:
    """What names a recipe: a file, and possibly a method of the study in it and settings that are laid on top."""

    path: str
    method: str = ""
    settings: tuple[str, ...] = ()


def refer(name: str | Path) -> Reference:
    """Parse a recipe's name: PATH, PATH:METHOD, PATH:key=value,key=value or PATH:METHOD,key=value.

    A comma separates settings only where a key and = follow it, so that lists stay whole: `train.betas=[1,2],seed=1`.
    """
    path, _, rest = str(name).partition(":")
    if not re.match(rf"{METHOD}(,|=|$)", rest) or os.path.isfile(os.path.expanduser(str(name))):
        return Reference(str(name))
    first, *others = re.split(r",(?=[\w.-]+=)", rest)
    return Reference(path, "", (first, *others)) if "=" in first else Reference(path, first, tuple(others))


def is_override(text: str) -> bool:
    """Return whether an argument is a setting, key=value, rather than a recipe's name, which may hold settings too."""
    return "=" in text and ":" not in text.partition("=")[0]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid on top; a mapping whose `name` changes is replaced, arguments and all.

    Of the alternatives `steps` and `epochs`, setting one takes the other back.
    """
    merged = dict(base)
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in over and other in merged and other not in over:
            merged[other] = None
    for key, value in over.items():
        old = merged.get(key)
        replaced = isinstance(value, Mapping) and isinstance(old, Mapping) and _renamed(old, value)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and not replaced:
            merged[key] = merge(old, value)
        else:
            merged[key] = merge({}, value) if isinstance(value, Mapping) else value
    return merged


def _renamed(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "name" in new and new["name"] != old.get("name")


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting by its dotted name, such as "train.steps"."""
    flattened: dict[str, Any] = {}
    for key, value in settings.items():
        nested = {f".{name}": one for name, one in flat(value).items()} if isinstance(value, Mapping) else {"": value}
        flattened.update({f"{key}{name}": one for name, one in nested.items()})
    return flattened


def methods_of(given: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Return a study's methods by name; a method's keys may be dotted, as on the command line."""
    if not isinstance(given, dict):
        raise UserError(
            f"{path}: methods={given!r}: expected a mapping of names to settings, such as {{mine: {{seed: 1}}}}"
        )
    methods: dict[str, dict[str, Any]] = {}
    for name, settings in given.items():
        if not re.fullmatch(METHOD, str(name)):
            raise UserError(
                f"{path}: methods.{name}: a name is made of letters, digits and _ . + -, since it is a folder's"
            )
        if not isinstance(settings, dict):
            raise UserError(f"{path}: methods.{name}={settings!r}: expected a mapping of settings, or {{}} for none")
        nested: dict[str, Any] = {}
        for key, value in settings.items():
            for part in reversed(str(key).split(".")):
                value = {part: value}
            nested = merge(nested, value)
        methods[str(name)] = nested
    return methods


def with_method(
    base: dict[str, Any], methods: Mapping[str, dict[str, Any]], name: str, path: Path, below: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return `base` with the method called `name` on top, and between them the method that it extends."""
    own = {key: value for key, value in methods[name].items() if key != "extends"}
    if "extends" in methods[name]:
        parent, below = str(methods[name]["extends"]), (*below, name)
        if parent not in methods or parent in below:
            known = [one for one in methods if one not in below]
            raise UserError(f"{path}: methods.{name}.extends={parent}: no other method.{suggest(parent, known)}")
        base = with_method(base, methods, parent, path, below)
    settings = merge(base, own)
    for key, value in own.items():
        if merge(base, {key: value}) == base:
            raise UserError(f"{path}: methods.{name}.{key}: changes nothing, the method has it already; leave it out")
    return settings


def folder_name(settings: Iterable[str]) -> str:
    """Return a folder's name for settings, the same in whatever order; what a folder's name cannot tell is hashed."""
    text = "-".join(sorted(settings))
    plain = re.sub(r"[^\w.+-]", "_", text)
    lossless = len(plain) <= 120 and plain == text.replace("=", "_")
    return plain if lossless else f"{plain[:120]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
