"""The verbs that only describe: list, students, explain, show; and init, which writes a recipe."""

import inspect
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmdistill.catalog import Component
    from fmdistill.signatures import Setting

WIDTH = 110


def init(arguments: list[str]) -> None:
    """Write a recipe for the user's own images, and print what was counted and the next commands."""
    from fmdistill.pipeline import start

    _print(start.init(*start.complete(arguments, ask=sys.stdin.isatty())))


def list_names(what: list[str]) -> None:
    """Print a line for each recipe, study, protocol and component, or for those of some kinds."""
    from fmdistill import catalog
    from fmdistill.registry import UserError, suggest

    kinds = {kind.plural: key for key, kind in catalog.KINDS.items()}
    for name in what:
        if name not in [*catalog.FILES, *kinds, "components"]:
            raise UserError(f"list {name}: unknown.{suggest(name, [*catalog.FILES, *kinds, 'components'])}")
    chosen = [name for name in [*catalog.FILES, *kinds] if not what or name in what]
    if "components" in what:
        chosen += [name for name in kinds if name not in chosen]
    for name in chosen:
        if name in catalog.FILES:
            title, entries = name, catalog.files(name)
        else:
            kind = catalog.KINDS[kinds[name]]
            title = f"{name} ({kind.setting})" if kind.setting else name
            entries = {entry.name: entry.summary for entry in catalog.components(kinds[name])}
        width = max(map(len, entries), default=0)
        _print("\n".join([title, *(f"  {entry:{width}}  {about}" for entry, about in entries.items()), ""]))
    _print("`fmdistill explain NAME` says more of one of them.")


def students(patterns: list[str]) -> None:
    """Print the parameters and the multiply-adds of students at their real sizes."""
    from fmdistill.distill import sizes
    from fmdistill.logs import progress

    title = "counting the multiply-adds of students"
    _print(sizes.text(list(progress(sizes.sizes(patterns), title, unit="student"))))
    _print("`fmdistill explain student.timm_sam` has the settings of students on timm's backbones.")


def show(recipe: str, overrides: list[str]) -> None:
    """Print the resolved recipe as YAML."""
    from fmdistill.recipe import load, to_yaml

    _print(to_yaml(load(recipe, overrides)).rstrip())


def explain(name: str) -> None:
    """Print what a recipe, a protocol, a setting or a component is, and its settings."""
    from fmdistill import catalog

    head, _, rest = name.partition(".")
    if name.endswith((".yaml", ".yml")) or "/" in name:
        _print(_file(name))
    elif name in catalog.GROUPS or head in catalog.GROUPS and head != "recipe" and not rest.startswith("executor."):
        _print(_group(head, rest))
    elif name in catalog.KINDS:
        _print(_kind(name))
    elif rest == "" and name in [setting.name for setting in catalog.group_settings("recipe")]:
        _print(_group("recipe", name))
    else:
        _print("\n\n".join(map(_component, catalog.find(name))))


def _print(text: object) -> None:
    """Print a text; if the reader has ended, such as `head`, print nothing more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _file(name: str) -> str:
    from fmdistill import catalog, recipe

    path = recipe.locate(name)
    parts = [name, "", catalog.head_comment(path) or "without a comment at its head", ""]
    if listed := catalog.methods(path):
        parts += [textwrap.fill(f"Methods: {', '.join(listed)}", WIDTH), ""]
        name = f"{name}:{listed[0]}"
    stored = recipe.read_yaml(path)
    protocol = "name" in stored  # a recipe has none
    if isinstance(stages := stored.get("stages"), dict):
        parts += [textwrap.fill(f"Stages: {', '.join(map(str, stages))}", WIDTH), ""]
    return "\n".join([*parts, f"All settings: {f'cat {path}' if protocol else f'fmdistill show {name}'}"])


def _group(group: str, name: str) -> str:
    """Return the settings of a group, or one of them, as text."""
    from fmdistill import catalog
    from fmdistill.registry import UserError, suggest

    settings = catalog.group_settings(group)
    if name:
        known = [setting.name for setting in settings]
        if name not in known:
            raise UserError(f"explain {group}.{name}: no such setting.{suggest(name, known)}")
        settings = [setting for setting in settings if setting.name == name]
    prefix = "" if group == "recipe" else f"{group}."
    return "\n".join(_table([_row(setting, prefix) for setting in settings]))


def _kind(name: str) -> str:
    from fmdistill import catalog

    kind, entries = catalog.KINDS[name], catalog.components(name)
    width = max(len(entry.name) for entry in entries)
    setting = f"   {kind.setting}=NAME" if kind.setting else ""
    lines = [f"{name}{setting}", "", kind.about, "", *(f"  {e.name:{width}}  {e.summary}" for e in entries), ""]
    return "\n".join([*lines, f"Settings of one of them: fmdistill explain {name}.{entries[0].name}"])


def _component(entry: "Component") -> str:
    """Return a component's docstring and its settings as text; this imports the component."""
    from fmdistill import catalog
    from fmdistill.registry import load
    from fmdistill.signatures import settings

    kind = catalog.KINDS[entry.kind]
    value = load(f"{entry.module}:{entry.attribute}", f"explain {entry.name}")
    rows = [_row(setting) for setting in settings(value, kind.supplied)]
    named = f"{kind.setting}={entry.name}" if kind.setting else f"fmdistill export RUN {entry.name} OUT"
    lines = [f"{entry.kind}.{entry.name}   {named}", "", entry.doc, ""]
    return "\n".join([*lines, *(_table(rows) if rows else ["It has no settings."]), "", f"Defined in {_place(value)}"])


def _place(value: Any) -> str:
    file = Path(inspect.getsourcefile(value) or "")
    return f"{file}:{inspect.getsourcelines(value)[1]}"


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """Return rows of name, type, default and meaning as aligned lines, long meanings below each other."""
    rows = [("setting", "type", "default", "meaning" if any(row[3] for row in rows) else ""), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    indent = sum(widths) + 6
    lines = []
    for row in rows:
        start = "  ".join(f"{cell:{width}}" for cell, width in zip(row[:3], widths, strict=True))
        about = textwrap.wrap(row[3], max(40, WIDTH - indent)) or [""]
        lines += [f"{start}  {about[0]}".rstrip(), *(f"{'':{indent}}{more}" for more in about[1:])]
    return lines


def _row(setting: "Setting", prefix: str = "") -> tuple[str, str, str, str]:
    about = re.sub(r"\bNone\b", "null", setting.about)  # as a recipe writes it
    return f"{prefix}{setting.name}", setting.type.replace("`", ""), setting.default, about
