"""Write the reference pages of the site from the code: components with their settings, verbs, recipes, protocols.

Run as a script, it writes them into a folder: `python docs/site/reference.py FOLDER`.
"""

import argparse
import ast
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fmdistill import catalog
from fmdistill.catalog import KINDS, Kind
from fmdistill.signatures import REQUIRED, settings

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Page:
    """What the page of a kind of component says before the components; `also` are settings that all of them take."""

    title: str
    about: str
    also: tuple[tuple[str, str], ...] = ()  # name, meaning


PAGES = {  # by kind, as in fmdistill.catalog
    "images": Page(
        "Sources of images",
        "Where the images come from. [Images](../images.md) has the rules for pixels, tars and class folders.",
        (
            ("limit", "at most so many images of each split"),
            ("orientation", "`apply` (default) or `ignore` the EXIF orientation"),
            ("max_pixels", "the largest image that is decoded"),
        ),
    ),
    "teacher": Page(
        "Teachers",
        "The frozen network whose outputs are cached. Guides: [SAM](../sam.md), [CLIP](../clip.md), "
        "[timm](../timm.md).",
        (
            ("live", "`true` runs the teacher beside the student; nothing is cached"),
            ("family", "the family of a teacher of your own, `package.module:FAMILY`"),
        ),
    ),
    "student": Page(
        "Students",
        "The network that is trained.",
        (
            (
                "pretrained",
                "a run, or a file of this student's weights, to start from ([checkpoints](../checkpoints.md))",
            ),
        ),
    ),
    "task": Page("Tasks", "How the student is trained."),
    "distance": Page(
        "Distances",
        "How student and teacher are compared. [Distances and weightings](../objectives.md) says how terms are put "
        "together.",
    ),
    "weighting": Page(
        "Weightings",
        "How much each image or patch counts.",
        (
            (
                "until",
                "the share of the run's steps after which weights are uniform "
                "([schedules](../objectives.md#schedules-and-mixtures))",
            ),
            ("fade", "whether they become so steadily, from the first step until `until`"),
            ("mix", "the share of uniform weights in the whole run"),
        ),
    ),
    "rectify": Page("Rectifiers", "Corrections of the teacher's output before it is compared."),
    "optimizer": Page("Optimizers", "How the weights are updated."),
    "schedule": Page("Schedules", "The learning rate's factor over the steps."),
    "executor": Page(
        "Executors", "Which processes run the teacher. [Several machines](../cluster.md) has Slurm and Ray."
    ),
    "evaluator": Page(
        "Evaluators",
        "What a protocol's `name` may be. [Evaluators](../evaluators.md) says what each one measures.",
    ),
}


def pages() -> dict[str, str]:
    """Return every generated page, its text by its path."""
    made = {f"reference/{KINDS[name].plural}.md": kind_page(KINDS[name], page) for name, page in PAGES.items()}
    return {**made, "reference/verbs.md": verbs_page(), "reference/recipes.md": recipes_page()}


def components(kind: Kind) -> dict[str, Callable]:
    """Return the components of a kind by name, imported."""
    module, _, attribute = kind.registry.partition(":")
    entries = getattr(importlib.import_module(module), attribute)
    if kind.plural == "teachers":
        families = {name: _loaded(entry) for name, entry in entries.items()}
        entries = {name: builder for family in families.values() for name, builder in family.teachers.items()}
    return {name: _loaded(entry) for name, entry in entries.items()}


def kind_page(kind: Kind, page: Page) -> str:
    """Return the reference page of one kind of component, as Markdown."""
    module, _, attribute = kind.registry.partition(":")
    named_in = "Named in a protocol." if kind.setting == "name" else f"Named by `{kind.setting}` in a recipe."
    lines = [f"# {page.title}", "", page.about, "", f"{named_in} The registry is `{attribute}` in `{module}`."]
    if page.also:
        lines += ["", "Every one of them also takes:", "", "| setting | meaning |", "|---|---|"]
        lines += [f"| `{kind.setting.removesuffix('name')}{name}` | {meaning} |" for name, meaning in page.also]
    named = components(kind)
    short = {name: component for name, component in named.items() if kind.plural == "students" and _is_short(component)}
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
    return [setting.name for setting in settings(component)] == ["classes"] and "\n\n" not in about(component)


def _component(kind: Kind, component: Callable) -> list[str]:
    described = settings(component, kind.supplied)
    lines = [prose(about(component))]
    if not described:
        return [*lines, "", "No settings."]
    meanings = any(setting.about for setting in described)
    lines += [
        "",
        "| setting | type | default |" + (" meaning |" if meanings else ""),
        "|---|---|---|" + ("---|" if meanings else ""),
    ]
    for setting in described:
        default = setting.default if setting.default == REQUIRED else f"`{setting.default}`"
        row = f"| `{setting.name}` | {cell(setting.type)} | {cell(default)} |"
        lines.append(row + (f" {cell(setting.about)} |" if meanings else ""))
    return lines


def about(component: Callable) -> str:
    """Return a component's docstring without what only a caller of the function needs."""
    text = inspect.getdoc(component) or ""
    text = re.sub(r"\s*Raises\s+UserError[^.]*\.|; (inner )?blocks as described at `\w+`", "", text)
    return _capitalised(text.removeprefix("Return ").strip())


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
    for name, entry in FORMATS.items():
        module, function = str(entry).split(":")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        (writer,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
        summary = str(ast.get_docstring(writer)).split("\n\n")[0]
        lines.append(f"| `{name}` | {cell(prose(summary))} |")
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
    """Return the first sentence of a recipe's or protocol's head comment, as Markdown."""
    return _sentence(prose(catalog.sentence(catalog.claim(path))))


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
