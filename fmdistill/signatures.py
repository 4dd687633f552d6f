"""Describe settings as the author of a recipe writes them: name, type, default, and the comment beside each."""

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", dict: "mapping"}
REQUIRED = "required"  # what stands for a default if there is none


@dataclass(frozen=True)
class Setting:
    """A setting: its name, its type and default as text, and what its comment says, "" without one."""

    name: str
    type: str
    default: str
    about: str = ""


def settings(component: Callable, supplied: Iterable[str] = ()) -> list[Setting]:
    """Return the settings of a class or function: its parameters but those that the program supplies.

    Types are Markdown, with the values of a Literal in backticks; defaults are YAML in one line.
    """
    function = component.func if isinstance(component, functools.partial) else component
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    fields = {field.name: field for field in dataclasses.fields(function)} if dataclasses.is_dataclass(function) else {}
    meanings, described = comments(function), []
    for name, parameter in inspect.signature(component).parameters.items():
        if name in supplied or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = parameter.default
        factory: Any = fields[name].default_factory if name in fields else dataclasses.MISSING
        if factory is not dataclasses.MISSING:
            default = factory()
        text = REQUIRED if default is parameter.empty else value_text(default)
        described.append(Setting(name, type_text(hints.get(name, Any)), text, meanings.get(name, "")))
    return described


def type_text(kind: Any) -> str:
    """Return what a recipe's author writes for an annotation: text, integer, one of several values, ..."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(option) for option in inner)
    if origin in (list, tuple) or kind in (list, tuple):
        if not inner or origin is list or inner[-1] is Ellipsis:
            return f"list of {_plural(type_text(inner[0]))}" if inner else "list"
        return f"[{', '.join(type_text(option) for option in inner)}]"
    if origin in (dict, Mapping, typing.get_origin(typing.Mapping)) or kind in (dict, Mapping):
        return f"mapping of {_plural(type_text(inner[1]))}" if inner and inner[1] is not Any else "mapping"
    if dataclasses.is_dataclass(kind):
        return "mapping"
    return NAMES.get(kind, "any value" if kind in (Any, object) else getattr(kind, "__name__", str(kind)))


def _plural(name: str) -> str:
    return f"{name}s" if name in NAMES.values() else name


def value_text(value: Any) -> str:
    """Return a default as a recipe writes it, in one line of YAML."""
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=1000).strip().removesuffix("...").strip()
    return '""' if value == "" else text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def comments(component: Any) -> dict[str, str]:
    """Return the comment of each field or parameter: after it in its line, or in the lines above it."""
    if inspect.isclass(component):
        meanings: dict[str, str] = {}
        for base in reversed(component.__mro__[:-1]):
            if base.__module__.startswith("fmdistill"):
                meanings |= _comments(base)
                if inspect.isfunction(vars(base).get("__init__")):
                    meanings |= _comments(base.__init__)
        return meanings
    return _comments(component)


def _comments(definition: Any) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(definition))
    except (OSError, TypeError):
        return {}
    lines: dict[int, tuple[str, bool]] = {}  # the comment of a line, and whether the line has nothing else
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] = (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
    node = ast.parse(source).body[0]
    if isinstance(node, ast.ClassDef):
        named = [(n.target.id, n.lineno, n.end_lineno) for n in node.body
                 if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]  # fmt: skip
    else:
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        named = [(a.arg, a.lineno, a.end_lineno) for a in [*node.args.args, *node.args.kwonlyargs]]
    meanings = {}
    for name, first, last in named:
        above = []
        while lines.get(first - 1 - len(above), ("", False))[1]:
            above.insert(0, lines[first - 1 - len(above)][0])
        beside = [
            text
            for line in range(first, (last or first) + 1)
            for text, alone in [lines.get(line, ("", True))]
            if not alone
        ]
        if above or beside:
            meanings[name] = " ".join([*above, *beside])
    return meanings
