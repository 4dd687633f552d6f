"""Write the reference pages of the site from the code: components with their settings, verbs, recipes, protocols.

Run as a script, it writes them into a folder: `python docs/site/reference.py FOLDER`.
"""

import argparse
import ast
import dataclasses
import functools
import importlib
import inspect
import io
import re
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", dict: "mapping"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of component: its page, the recipe key that names it, and where its registry is."""

    page: str
    title: str
    key: str  # such as `objective.TERM.weighting`
    registry: str  # "module:DICT"
    about: str
    context: tuple[str, ...] = ()  # parameters that the program supplies, not the recipe
    also: tuple[tuple[str, str], ...] = ()  # settings of every component of the kind: name, meaning
    names_in: str = "objective"  # a recipe or a protocol


SHAPES = ("student", "teacher", "shapes", "priors")
KINDS = [
    Kind("sources", "Sources of images", "images", "fmdistill.images:SOURCES",
         "Where the images come from. [Images](../images.md) has the rules for pixels, tars and class folders.",
         also=(("limit", "at most so many images of each split"),
               ("orientation", "`apply` (default) or `ignore` the EXIF orientation"),
               ("max_pixels", "the largest image that is decoded"))),
    Kind("teachers", "Teachers", "teacher", "fmdistill.teachers:FAMILIES",
         "The frozen network whose outputs are cached. Guides: [SAM](../sam.md), [CLIP](../clip.md), "
         "[timm](../timm.md).",
         also=(("live", "`true` runs the teacher beside the student; nothing is cached"),
               ("family", "the family of a teacher of your own, `package.module:FAMILY`"))),
    Kind("students", "Students", "student", "fmdistill.distill.student:STUDENTS", "The network that is trained.",
         also=(("pretrained", "a run, or a file of this student's weights, to start from "
                "([checkpoints](../checkpoints.md))"),)),
    Kind("tasks", "Tasks", "task", "fmdistill.distill.tasks:TASKS", "How the student is trained.", ("recipe",)),
    Kind("distances", "Distances", "objective.TERM.distance", "fmdistill.distill.distances:DISTANCES",
         "How student and teacher are compared. [Distances and weightings](../objectives.md) says how terms are put "
         "together.", SHAPES),
    Kind("weightings", "Weightings", "objective.TERM.weighting", "fmdistill.distill.weightings:WEIGHTINGS",
         "How much each image or patch counts.", SHAPES),
    Kind("rectifiers", "Rectifiers", "objective.TERM.rectify", "fmdistill.distill.rectifiers:RECTIFIERS",
         "Corrections of the teacher's output before it is compared.", SHAPES),
    Kind("optimizers", "Optimizers", "optimizer", "fmdistill.distill.optim:OPTIMIZERS", "How the weights are updated.",
         ("model",)),
    Kind("schedules", "Schedules", "schedule", "fmdistill.distill.optim:SCHEDULES",
         "The learning rate's factor over the steps."),
    Kind("executors", "Executors", "cache.executor", "fmdistill.cache.executors:EXECUTORS",
         "Which processes run the teacher. [Several machines](../cluster.md) has Slurm and Ray.",
         ("images", "start", "plan")),
    Kind("evaluators", "Evaluators", "name", "fmdistill.evaluate:EVALUATORS",
         "What a protocol's `name` may be. [Evaluators](../evaluators.md) says what each one measures.",
         names_in="a protocol"),
]  # fmt: skip


def pages() -> dict[str, str]:
    """Return every generated page, its text by its path."""
    made = {f"reference/{kind.page}.md": kind_page(kind) for kind in KINDS}
    return {**made, "reference/verbs.md": verbs_page(), "reference/recipes.md": recipes_page()}


def components(kind: Kind) -> dict[str, Callable]:
    """Return the components of a kind by name, imported."""
    module, _, attribute = kind.registry.partition(":")
    entries = getattr(importlib.import_module(module), attribute)
    if kind.page == "teachers":
        families = {name: _loaded(entry) for name, entry in entries.items()}
        entries = {name: builder for family in families.values() for name, builder in family.teachers.items()}
    return {name: _loaded(entry) for name, entry in entries.items()}


def kind_page(kind: Kind) -> str:
    """Return the page of one kind of component."""
    where = "a recipe" if kind.names_in == "objective" else kind.names_in
    lines = [f"# {kind.title}", "", kind.about, ""]
    lines += [f"Named by `{kind.key}.name` in {where}." if kind.names_in == "objective" else f"Named in {where}."]
    lines[-1] += f" The registry is `{kind.registry.partition(':')[2]}` in `{kind.registry.partition(':')[0]}`."
    if kind.also:
        lines += ["", "Every one of them also takes:", "", "| setting | meaning |", "|---|---|"]
        lines += [f"| `{kind.key}.{name}` | {meaning} |" for name, meaning in kind.also]
    named = components(kind)
    short = {name: component for name, component in named.items() if kind.page == "students" and _is_short(component)}
    classes = {getattr(component, "__name__", ""): name for name, component in named.items()}
    for name, component in named.items():
        if name not in short:
            section = "\n".join(_component(kind, component))
            section = re.sub(r"`(\w+)`", lambda quoted: f"`{classes.get(quoted[1], quoted[1])}`", section)
            lines += ["", f"## {name}", "", re.sub(r"\bNone\b", "null", section)]
    if short:
        lines += ["", "## Classifiers of the CIFAR tables", "", "Each takes `classes`, 100 by default."]
        lines += ["", "| name | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {cell(prose(about(component)))} |" for name, component in short.items()]
    return "\n".join(lines) + "\n"


def _is_short(component: Callable) -> bool:
    """Return whether a component has one sentence to say, and no setting but `classes`."""
    return [name for name, *_ in parameters(component)] == ["classes"] and "\n\n" not in about(component)


def _component(kind: Kind, component: Callable) -> list[str]:
    settings = list(parameters(component, kind.context))
    lines = [prose(about(component))]
    if not settings:
        return [*lines, "", "No settings."]
    meanings = any(meaning for *_, meaning in settings)
    lines += [
        "",
        "| setting | type | default |" + (" meaning |" if meanings else ""),
        "|---|---|---|" + ("---|" if meanings else ""),
    ]
    for name, type_, default, meaning in settings:
        lines.append(f"| `{name}` | {cell(type_)} | {cell(default)} |" + (f" {cell(meaning)} |" if meanings else ""))
    return lines


def about(component: Callable) -> str:
    """Return a component's docstring without what only a caller of the function needs."""
    text = inspect.getdoc(component) or ""
    text = re.sub(r"\s*Raises\s+UserError[^.]*\.|; (inner )?blocks as described at `\w+`", "", text)
    return _capitalised(text.removeprefix("Return ").strip())


def parameters(component: Callable, context: Iterable[str] = ()) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and meaning of each setting of a component."""
    made = functools.partial(component) if not isinstance(component, functools.partial) else component
    function = made.func
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    meanings = comments(function)
    for name, parameter in inspect.signature(component).parameters.items():
        if name in context or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = parameter.default
        if inspect.isclass(function) and dataclasses.is_dataclass(function):
            field = next((f for f in dataclasses.fields(function) if f.name == name), None)
            if field is not None and field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
        shown = "required" if default is parameter.empty else f"`{value_text(default)}`"
        yield name, type_text(hints.get(name, Any)), shown, meanings.get(name, "")


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
                meanings |= (
                    _comments(base.__init__) if "__init__" in vars(base) and inspect.isfunction(base.__init__) else {}
                )
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


def verbs_page() -> str:
    """Return the page of the command line's verbs, from its parser."""
    from fmdistill import cli

    top = cli.parser()
    (choices,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    lines = ["# Verbs", "", prose(str(top.description)), ""]
    lines += [prose(paragraph) for paragraph in [" ".join(str(top.epilog).split())]]
    lines += ["", "| verb | what it does |", "|---|---|"]
    lines += [
        f"| [`{name}`](#{name}) | {cell(prose(str(verb.description)))} |" for name, verb in choices.choices.items()
    ]
    for name, verb in choices.choices.items():
        usage = " ".join(verb.format_usage().removeprefix("usage: ").replace("[-h] ", "").split())
        lines += ["", f"## {name}", "", f"{_sentence(prose(str(verb.description)))}", "", "```text", usage, "```"]
        arguments = [action for action in verb._actions if action.dest != "help"]
        lines += ["", "| argument | meaning |", "|---|---|"] if arguments else []
        for action in arguments:
            flag = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            lines.append(f"| `{flag}` | {cell(prose(action.help or ''))} |")
        lines += _formats() if name == "export" else []
    return "\n".join(lines) + "\n"


def _formats() -> list[str]:
    from fmdistill.export import FORMATS

    lines = ["", "| format | what is written |", "|---|---|"]
    for name in FORMATS:
        (file,) = (ROOT / "fmdistill/export").glob(f"{name}*.py")
        lines.append(f"| `{name}` | {cell(prose(str(ast.get_docstring(ast.parse(file.read_text())))))} |")
    return lines


def recipes_page() -> str:
    """Return the page of the recipes, studies and protocols in the repository, each with what it claims."""
    lines = ["# Recipes and protocols", "", "What ships with the package. A path is given to a verb as it stands here."]
    for folder in sorted({path.parent.parent if path.name == "study.yaml" else path.parent
                          for path in (ROOT / "recipes").rglob("*.yaml")}):  # fmt: skip
        lines += ["", f"## {folder.relative_to(ROOT)}", "", "| recipe | what it is for |", "|---|---|"]
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("*/study.yaml")]):
            study = path.name == "study.yaml"
            lines.append(
                f"| `{(path.parent if study else path).relative_to(ROOT)}` | {cell(claim(path))}{_methods(path)} |"
            )
    lines += ["", "## eval", "", "| protocol | evaluator | what it measures |", "|---|---|---|"]
    for path in sorted((ROOT / "eval").glob("*.yaml")):
        name = yaml.safe_load(path.read_text())["name"]
        lines.append(f"| `{path.relative_to(ROOT)}` | [`{name}`](evaluators.md#{name}) | {cell(claim(path))} |")
    return "\n".join(lines) + "\n"


def claim(path: Path) -> str:
    """Return the first sentence of a recipe's or protocol's head comment."""
    head = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        head.append(line.lstrip("#").strip())
    text = re.sub(r"^Claim:\s*", "", " ".join(head))
    return _sentence(prose(re.split(r"(?<!et al)(?<=[\w)])\. |\.$|\s[A-Z][a-z]+:\s| - ", text)[0]))


def _methods(path: Path) -> str:
    methods = yaml.safe_load(path.read_text()).get("methods") or {}
    return f" Methods: {', '.join(f'`{name}`' for name in methods)}." if methods else ""


def _sentence(text: str) -> str:
    return f"{_capitalised(text.strip().rstrip('.'))}."


def _capitalised(text: str) -> str:
    is_name = re.match(r"\S*[_/\\(`]", text)
    return text if is_name else text[:1].upper() + text[1:]


def prose(text: str) -> str:
    """Return plain text as Markdown: what is not in backticks is escaped, so that it is shown as it stands."""
    parts = re.split(r"(`[^`\n]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", part) for part in parts)


def cell(text: str) -> str:
    """Return text as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _loaded(entry: Any) -> Any:
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    for name, text in pages().items():
        file = Path(sys.argv[1]) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
