"""Several recipes beside each other: loaded by name, told apart in a table, and refused if two of them are alike."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fmdistill import recipe
from fmdistill.distill import objective
from fmdistill.distill.distances import DISTANCES
from fmdistill.distill.optim import OPTIMIZERS, SCHEDULES
from fmdistill.distill.rectifiers import RECTIFIERS
from fmdistill.distill.weightings import WEIGHTINGS
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, bind, parse
from fmdistill.settings import flat, parse_recipe_name

TABLES = {
    "distance": DISTANCES,
    "weighting": WEIGHTINGS,
    "rectify": RECTIFIERS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}
SUPPLIED = (*objective.SHAPES, "priors", "model")  # what a component gets from elsewhere than a recipe


def load(names: Iterable[str], overrides: Sequence[str] = ()) -> dict[str, Recipe]:
    """Return the recipes by name, each with `overrides`."""
    return {name: recipe.load(name, overrides) for name in names}


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Begin a UserError about the recipe or protocol `name` with its name."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None


def check_distinct(loaded: Mapping[str, Recipe], overrides: Sequence[str] = ()) -> None:
    """Raise a UserError if two recipes would train the same student, or if a setting in a recipe's name is its already.

    A component's defaults count as set, so that a default written out makes no difference.
    """
    known: list[tuple[str, dict[str, Any]]] = []
    free = {"title", *recipe.free_settings()}
    for name, settings in loaded.items():
        _check_effect(name, settings, overrides)
        decisive = {k: v for k, v in settled(settings).items() if k not in free and not k.startswith("cache.executor.")}
        for other, other_decisive in known:
            if decisive == other_decisive:
                raise UserError(f"{name}: trains the same student as {other}; change a setting of it, or leave it out")
        known.append((name, decisive))


def _check_effect(name: str, settings: Recipe, overrides: Sequence[str]) -> None:
    """Raise a UserError for a setting in the recipe's name without which it is the same recipe."""
    given = parse_recipe_name(name)
    for setting in given.settings:
        rest = ",".join([*filter(None, [given.method]), *(one for one in given.settings if one != setting)])
        try:
            without = settled(recipe.load(f"{given.path}:{rest}".rstrip(":"), overrides))
        except UserError:  # the recipe needs it
            continue
        if {**without, "out": settings.out, "title": settings.title} == settled(settings):
            raise UserError(f"{name}: {setting}: changes nothing, the recipe has this value already; leave it out")


def settled(settings: Recipe) -> dict[str, Any]:
    """Return every setting by its dotted name, texts read as values and the defaults of components filled in."""
    plain = dataclasses.asdict(settings)
    if settings.objective:
        terms = objective.check(settings.objective)
        plain["objective"] = {key: dataclasses.asdict(term) for key, term in terms.items()}
    return {**flat(_filled(plain, "")), "out": settings.out, "title": settings.title}


def _filled(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        if key in TABLES and "name" in value:
            component = bind(value, TABLES[key], key, SUPPLIED)
            parameters = inspect.signature(component.func).parameters.values()
            defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
            value = {"name": value["name"], **defaults, **component.keywords}
        return {name: _filled(inner, name) for name, inner in value.items()}
    return _read(value) if isinstance(value, str) else value


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> Any:
    try:
        return parse(text, "")
    except UserError:
        return text


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return what a table calls each recipe: a method's name or a file's, and settings; two alike are named in full."""
    short = {}
    for name in names:
        given = parse_recipe_name(name)
        parts = [setting.partition("=") for setting in given.settings]
        shown = [f"{key.removesuffix('.name').rpartition('.')[2]}={value}" for key, _, value in parts]
        short[name] = ", ".join([given.method or Path(given.path).stem, *shown])
    called = list(short.values())
    return {name: one if called.count(one) == 1 else name for name, one in short.items()}
