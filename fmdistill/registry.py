"""Look up components by name and check their settings against their signatures, before any data is touched."""

import dataclasses
import difflib
import functools
import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any


class UserError(ValueError):
    """An error in what a user wrote or supplied; the message names the value, the place and the way out."""


def suggest(name: str, known: Collection[str]) -> str:
    """Return the end of an error about an unknown `name`: ' Did you mean ...? Known: ...'."""
    close = difflib.get_close_matches(str(name), [str(entry) for entry in known], n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Known: {', '.join(sorted(map(str, known))) or 'none'}."


Entry = Callable | str  # a class or function, or its "module:Name" within fmdistill, imported when it is used


def resolve(name: str, table: Mapping[str, Entry], where: str) -> Callable:
    """Return the component `name` of `table`, or import the class or function "package.module:Name".

    Raises UserError if there is none; `where` names the setting.
    """
    if name in table:
        component = table[name]
        return _import_entry(component) if isinstance(component, str) else component
    if ":" not in name:
        raise UserError(
            f"{where}: unknown name '{name}'.{suggest(name, table)} Name your own component as 'package.module:Name'."
        )
    component = load(name, where)
    if not callable(component):
        raise UserError(f"{where}: '{name}' is a {type(component).__name__}; name a class or a function")
    return component


def _import_entry(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def load(reference: str, where: str) -> Any:
    """Import the object at a user's "module:Name", which may be in the working folder."""
    module, _, attribute = reference.partition(":")
    try:
        return getattr(_import(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: cannot import '{reference}': {error}. Is it in the working folder or on PYTHONPATH?"
        ) from error


def _import(module: str) -> types.ModuleType:
    if not {"", os.getcwd()} & set(sys.path):  # a console script starts without the working folder
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(module)


def bind(
    settings: Mapping[str, Any], table: Mapping[str, Entry], where: str, context: Collection[str] = ()
) -> functools.partial:
    """Check `settings` ({"name": ..., argument: value, ...}) and return their component with the arguments bound.

    `context` names the parameters that the caller supplies later, and settings may not. Raises UserError if a name or
    an argument is unknown, missing or mistyped.
    """
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        raise UserError(f"{where}: needs a `name`.{suggest('', table)}")
    arguments = {key: value for key, value in settings.items() if key != "name"}
    component = resolve(str(settings["name"]), table, f"{where}.name")
    return functools.partial(component, **typed(component, arguments, where, context))


def complete(component: functools.partial, context: Mapping[str, Any], where: str, why: str = "") -> Any:
    """Call the bound `component` with the values in `context` that are parameters of it.

    Raises UserError if a required one is None, which means that its value is not known; `why` ends the message.
    """
    parameters = inspect.signature(component.func).parameters
    supplied = {key: value for key, value in context.items() if key in parameters}
    for key, value in supplied.items():
        if value is None and parameters[key].default is inspect.Parameter.empty:
            name = getattr(component.func, "__name__", str(component.func))
            raise UserError(f"{where}: {name} needs `{key}`, which is not known for this recipe{why}")
    return component(**supplied)


def typed(
    component: Callable, arguments: Mapping[str, Any], where: str, context: Collection[str] = ()
) -> dict[str, Any]:
    """Convert `arguments` to the annotations of `component`.

    Raises UserError if an argument is unknown, missing or mistyped.
    """
    signature = inspect.signature(component)
    hints = typing.get_type_hints(component.__init__ if inspect.isclass(component) else component)
    known = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if name not in context and parameter.kind != parameter.VAR_KEYWORD
    }
    for key in arguments:
        if key not in known:
            raise UserError(f"{where}.{key}: no such setting, it would be ignored.{suggest(key, known)}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise UserError(f"{where}.{key}: required but not set; set it in the recipe or as {where}.{key}=VALUE")
    return {key: convert(value, hints.get(key, Any), f"{where}.{key}") for key, value in arguments.items()}


def convert(value: Any, kind: Any, where: str) -> Any:
    """Convert `value` to `kind`, a type annotation. Raises UserError that names both if that is not possible.

    If `kind` allows no string, a string is read as YAML, so that an override on the command line and a quoted value in
    a recipe mean the same.
    """
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    if type(None) in options and (value is None or value == "null"):  # before a Literal refuses it
        return None
    literals = [value for option in options for value in _literals(option)]
    others = [option for option in options if option is not type(None) and not _literals(option)]
    texts = {str, Any} & {*(others or map(type, literals))}
    if isinstance(value, str) and not texts and value not in literals:
        value = parse(value, where)
    if kind is Any or kind is inspect.Parameter.empty:
        return value
    for option in options:
        if others and _literals(option) and value not in _literals(option):
            continue
        try:
            return _as(value, option, where)
        except TypeError:
            continue
    expected = kind.__name__ if inspect.isclass(kind) else str(kind).replace("typing.", "")
    if others and literals:
        expected = " or ".join([*(getattr(other, "__name__", str(other)) for other in others), *map(str, literals)])
    quote = "; quote it to make it a text" if str in options and isinstance(value, int | float) else ""
    raise UserError(f"{where}={value!r}: expected {expected}, got {type(value).__name__}{quote}")


def _as(value: Any, kind: Any, where: str) -> Any:
    """Convert `value` to one annotation that is not a union. Raises TypeError if its type does not fit."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is typing.Literal:
        if value not in inner:
            raise UserError(f"{where}={value!r}: unknown.{suggest(value, inner)}")
        return str(value) if isinstance(value, str) else value
    if origin in (list, tuple) and isinstance(value, list | tuple):
        if not inner:
            return origin(value)
        kinds = (inner[0],) * len(value) if origin is list or inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise UserError(f"{where}={value!r}: expected {len(kinds)} values, got {len(value)}")
        return origin(convert(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {str(k): convert(v, inner[1], f"{where}.{k}") if inner else v for k, v in value.items()}
    if dataclasses.is_dataclass(origin) and isinstance(value, Mapping):
        return origin(**typed(origin, value, where))
    if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if inspect.isclass(origin) and isinstance(value, origin) and (origin is bool or not isinstance(value, bool)):
        return value
    raise TypeError


def parse(text: str, where: str) -> Any:
    """Read `text` as a YAML value, without interpolation. Raises UserError at `where` if it is not YAML."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{where}={text!r}: not a YAML value; write a list as [a, b], a mapping as {{a: 1}}") from error


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _literals(option: Any) -> tuple[Any, ...]:
    return typing.get_args(option) if typing.get_origin(option) is typing.Literal else ()
