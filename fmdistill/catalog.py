"""List recipes, protocols and components with what each is; components are read from source, not imported."""

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

from fmdistill import recipe
from fmdistill.registry import UserError, suggest
from fmdistill.settings import parse_methods
from fmdistill.signatures import Setting, settings

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Kind:
    """A kind of component: the registry that lists it, the setting that names it, and what a component of it does."""

    plural: str
    registry: str  # "module:NAME"; the families' registry stands for their teachers
    setting: str  # in a recipe, TERM standing for any term of the objective; "" for none
    about: str
    supplied: tuple[str, ...] = ()  # arguments that are no settings


SHAPES = ("student", "teacher", "shapes", "priors", "logit_scale")  # what a term gives its parts besides their settings
KINDS = {
    "images": Kind("sources", "fmdistill.images:SOURCES", "images.name", "Where the images come from."),
    "teacher": Kind("teachers", "fmdistill.teachers:FAMILIES", "teacher.name", "The model that is distilled."),
    "student": Kind("students", "fmdistill.distill.student:STUDENTS", "student.name", "The network that is trained."),
    "task": Kind("tasks", "fmdistill.distill.tasks:TASKS", "task.name", "How the student is trained.", ("recipe",)),
    "distance": Kind(
        "distances",
        "fmdistill.distill.distances:DISTANCES",
        "objective.TERM.distance.name",
        "How far the student's output is from the teacher's.",
        SHAPES,
    ),
    "weighting": Kind(
        "weightings",
        "fmdistill.distill.weightings:WEIGHTINGS",
        "objective.TERM.weighting.name",
        "How much each sample or patch counts. Each also takes `until` (a share of the run), `fade` and `mix`.",
        SHAPES,
    ),
    "rectify": Kind(
        "rectifiers",
        "fmdistill.distill.rectifiers:RECTIFIERS",
        "objective.TERM.rectify.name",
        "How the teacher's output is corrected before the student is compared with it.",
        SHAPES,
    ),
    "optimizer": Kind(
        "optimizers", "fmdistill.distill.optim:OPTIMIZERS", "optimizer.name", "How weights are updated.", ("model",)
    ),
    "schedule": Kind("schedules", "fmdistill.distill.optim:SCHEDULES", "schedule.name", "The learning rate by step."),
    "executor": Kind(
        "executors",
        "fmdistill.cache.executors:EXECUTORS",
        "cache.executor.name",
        "Which processes run the teacher.",
        ("images", "start", "plan"),
    ),
    "evaluator": Kind(
        "evaluators", "fmdistill.evaluate:EVALUATORS", "name", "How a finished student is measured; of a protocol file."
    ),
    "export": Kind(
        "exports",
        "fmdistill.export:FORMATS",
        "",
        "For which other software `fmdistill export RUN FORMAT OUT` writes a student.",
        ("source", "out"),
    ),
}
FILES = ("recipes", "studies", "protocols")
GROUPS = {"cache": "CacheSettings", "train": "Train", "recipe": "Recipe"}  # classes of settings in fmdistill.recipe


@dataclass(frozen=True)
class Component:
    """A component by its kind and name, where it is defined, and its docstring."""

    kind: str
    name: str
    module: str
    attribute: str
    doc: str

    @property
    def summary(self) -> str:
        """The docstring's first sentence."""
        return sentence(self.doc)


def sentence(text: str) -> str:
    """Return the first sentence of a text, in one line."""
    first = " ".join(text.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", first)[0]


def components(kind: str) -> list[Component]:
    """Return the components of a kind, in the order of their registry."""
    module, _, name = KINDS[kind].registry.partition(":")
    return [_described(kind, entry, place) for entry, place in _Reader(module).entries(name).items()]


def files(which: str) -> dict[str, str]:
    """Return the package's recipes, studies or protocols, with the first sentence of each file's comment."""
    listed = {}
    for path in recipe.shipped():
        study = path.endswith(f"/{recipe.STUDY}")
        kind = "protocols" if path.startswith("eval/") else "studies" if study else "recipes"
        if kind == which:
            listed[path.removesuffix(f"/{recipe.STUDY}")] = sentence(claim(recipe.locate(path)))
    return listed


def head_comment(path: Path) -> str:
    """Return the comment at the head of a YAML file, without its marks."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines)


def claim(path: Path) -> str:
    """Return the first paragraph of a file's comment, which says what it shows."""
    text = head_comment(path).removeprefix("Claim:").strip()
    return re.split(r"\n(?=[A-Z]\w+:|\n)", text)[0]


def methods(path: Path) -> list[str]:
    """Return the names of a study's methods."""
    return list(parse_methods(recipe.read_yaml(path).get("methods", {}), path))


def group_settings(group: str) -> list[Setting]:
    """Return the settings of `train`, of `cache`, or of a recipe's first level, with their comments."""
    return settings(getattr(recipe, GROUPS[group]))


def find(address: str) -> list[Component]:
    """Return the components with an address such as weighting.srw, objective.*.weighting.srw, or srw alone.

    Raises UserError with a suggestion if there are none.
    """
    *parents, name = address.split(".")
    kind = parents[-1] if parents else ""
    if kind and kind not in KINDS:
        raise UserError(f"explain {address}: no kind '{kind}'.{suggest(kind, [*KINDS, *GROUPS])}")
    candidates = [entry for each in ([kind] if kind else KINDS) for entry in components(each)]
    if matches := [entry for entry in candidates if entry.name == name]:
        return matches
    known = [entry.name for entry in candidates] if kind else [*KINDS, *GROUPS]
    close = [f"{entry.kind}.{entry.name}" for entry in candidates if _close(name, entry.name)]
    hint = f" Did you mean '{close[0]}'?" if close and not kind else ""
    raise UserError(f"explain {address}: unknown name '{name}'.{hint}{suggest(name, known)}")


def _close(name: str, other: str) -> bool:
    return "Did you mean" in suggest(name, [other])


def _described(kind: str, name: str, place: "tuple[str, ast.AST]") -> Component:
    module, node = place
    documented = isinstance(node, ast.FunctionDef | ast.ClassDef)
    doc = (ast.get_docstring(node) if documented else None) or _Reader(module).doc
    return Component(kind, name, module, getattr(node, "name", ""), doc)


class _Reader:
    """The definitions of one module, followed through its imports."""

    def __init__(self, module: str) -> None:
        self.module, self.tree = module, _tree(module)
        self.doc = ast.get_docstring(self.tree) or ""

    def entries(self, name: str) -> dict[str, tuple[str, ast.AST]]:
        """Return the entries of the dict `name`: the module and the definition of each."""
        module, node = self.definition(name)
        reader = _Reader(module)
        if isinstance(node, ast.Call):  # a Family record, which lists its teachers
            node = next(word.value for word in node.keywords if word.arg == "teachers")
        if not isinstance(node, ast.Dict):
            raise TypeError(f"{module}: {name} is no dict")
        entries: dict[str, tuple[str, ast.AST]] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                entries |= reader.entries(ast.unparse(value))
            elif isinstance(key, ast.Constant):
                entries |= reader.resolved(str(key.value), value)
        return entries

    def resolved(self, name: str, value: ast.AST) -> dict[str, tuple[str, ast.AST]]:
        """Return the definition of a registry's value; the entries of a record's teachers instead of the record."""
        module, attribute = self.module, ast.unparse(value)
        if isinstance(value, ast.Constant):
            module, _, attribute = str(value.value).partition(":")
        place = _Reader(module).definition(attribute)
        return _Reader(module).entries(attribute) if isinstance(place[1], ast.Call) else {name: place}

    def definition(self, name: str) -> tuple[str, ast.AST]:
        """Return the module that defines `name`, and its class, function or value."""
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                return self.module, node
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if name in map(ast.unparse, targets):
                    return self.module, node.value
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return _Reader(node.module).definition(alias.name)
        raise KeyError(f"{self.module}: {name}")


@functools.cache
def _tree(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())
