"""Several recipes at once: load them by name, check that they differ, and shorten their names for a table."""

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fmdistill import recipe
from fmdistill.distill import objective
from fmdistill.distill.distances import DISTANCES
from fmdistill.distill.optim import OPTIMIZERS, SCHEDULES
from fmdistill.distill.rectifiers import RECTIFIERS
from fmdistill.distill.weightings import WEIGHTINGS
from fmdistill.distill.weightings.blend import bind_weighting
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, bind, parse
from fmdistill.settings import flat, parse_recipe_name
from fmdistill.stages import by_stage

STAGE = "stage"  # begins the names of the settings of a recipe's stages
TABLES = {
    "distance": DISTANCES,
    "weighting": WEIGHTINGS,
    "rectify": RECTIFIERS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}
SUPPLIED = (
    *objective.SHAPES,
    "priors",
    "logit_scale",
    "model",
)  # arguments of components that do not come from a recipe


def load(names: Iterable[str], overrides: Sequence[str] = ()) -> dict[str, Recipe]:
    """Load recipes, each with `overrides`; return them by name."""
    return {name: recipe.load(name, overrides) for name in names}


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Put `name`, of a recipe or protocol, before the message of a UserError raised in the block."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None


def check_distinct(loaded: Mapping[str, Recipe], overrides: Sequence[str] = ()) -> None:
    """Raise a UserError if two recipes would train the same student, or if a setting in a name changes nothing.

    A component's defaults count as set, so that writing a default out makes no difference.
    """
    checked: list[tuple[str, dict[str, Any]]] = []
    for name, settings in loaded.items():
        with named(name):
            _check_effect(name, settings, overrides)
            decisive = {key: value for key, value in settled(settings).items() if _decides(key)}
        for other, other_decisive in checked:
            if decisive == other_decisive:
                raise UserError(f"{name}: trains the same student as {other}; change one of its settings, or remove it")
        checked.append((name, decisive))


def _decides(key: str) -> bool:
    """Return whether a setting, by its dotted name from `settled`, affects the weights."""
    name = re.sub(rf"^{STAGE} \d+\.", "", key)
    return name not in {"title", *recipe.free_settings()} and not name.startswith("cache.executor.")


def _check_effect(name: str, settings: Recipe, overrides: Sequence[str]) -> None:
    """Raise a UserError if a setting in the recipe's name does not change the recipe."""
    parts = parse_recipe_name(name)
    for setting in parts.settings:
        rest = ",".join([*filter(None, [parts.method]), *(other for other in parts.settings if other != setting)])
        try:
            without = settled(recipe.load(f"{parts.path}:{rest}".rstrip(":"), overrides))
        except UserError:  # the recipe is not complete without the setting
            continue
        if {**without, "out": settings.out, "title": settings.title} == settled(settings):
            raise UserError(f"{name}: {setting}: changes nothing, the recipe has this value already; remove it")


def settled(settings: Recipe) -> dict[str, Any]:
    """Return every setting by its dotted name, with texts parsed as YAML and the defaults of components filled in.

    The names of a recipe with stages begin with the number of the stage, such as "stage 1.train.steps".
    """
    names = {"out": settings.out, "title": settings.title}
    if settings.stages is None:
        return {**_settled(settings), **names}
    parts: dict[str, Any] = {}
    for number, stage in enumerate(by_stage(settings).values()):
        own = {key: value for key, value in _settled(stage).items() if key not in names}
        if number:
            del own["student.pretrained"]  # the folder of the run before
        parts |= {f"{STAGE} {number}.{key}": value for key, value in own.items()}
    return {**parts, **names}


def _settled(settings: Recipe) -> dict[str, Any]:
    plain = dataclasses.asdict(settings)
    if settings.objective:
        terms = objective.check(settings.objective)
        plain["objective"] = {key: dataclasses.asdict(term) for key, term in terms.items()}
    return flat(_filled(plain, ""))


def _filled(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        if key in TABLES and "name" in value:
            component, shared = _bound(value, key)
            parameters = inspect.signature(component.func).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
            value = {"name": value["name"], **shared, **defaults, **component.keywords}
        return {name: _filled(inner, name) for name, inner in value.items()}
    return _read(value) if isinstance(value, str) else value


def _bound(value: Mapping[str, Any], key: str) -> tuple[functools.partial, dict[str, Any]]:
    """Return a component with its arguments bound, and the settings of its kind that are none of its arguments."""
    if key == "weighting":
        weighting, blend = bind_weighting(value, key, SUPPLIED)
        return weighting, dataclasses.asdict(blend)
    return bind(value, TABLES[key], key, SUPPLIED), {}


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> Any:
    try:
        return parse(text, "")
    except UserError:
        return text


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return a short name of each recipe for a table: its method or file, and settings; the full name if ambiguous."""
    short = {}
    for name in names:
        parts = parse_recipe_name(name)
        settings = [setting.partition("=") for setting in parts.settings]
        texts = [f"{key.removesuffix('.name').rpartition('.')[2]}={value}" for key, _, value in settings]
        short[name] = ", ".join([parts.method or Path(parts.path).stem, *texts])
    all_short = list(short.values())
    return {name: label if all_short.count(label) == 1 else name for name, label in short.items()}
