"""Standardised targets of a recipe: what is refused, and the standardizers of its terms and its student."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fmdistill.cache import finished
from fmdistill.cache.reader import Cache
from fmdistill.distill import objective
from fmdistill.distill import student as students
from fmdistill.distill.objective import Objective, Shape, TermSettings
from fmdistill.distill.standardize import Standardizer, TeacherScale, last_layer, statistics
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, resolve

LOGITS = ("cross_entropy", "kd", "dkd")
PROJECTED = ("fitnet", "vid")


def check(recipe: Recipe) -> None:
    """Raise a UserError for a term whose targets cannot be standardised, without touching data."""
    terms = standardised_terms(recipe.objective)
    for name, term in terms.items():
        where = f"objective.{name}.standardize={term.standardize}"
        if recipe.teacher is None:
            raise UserError(f"{where}: the recipe has no teacher whose outputs it could standardise; remove it")
        if finished.is_live(recipe.teacher):
            raise UserError(
                f"{where}: a live teacher has no statistics; leave teacher.live out and give the recipe a `cache`, or "
                f"set it to none"
            )
        _check_distance(term, where)
        _check_student(recipe.student, term, where)
        _check_alike(name, term, terms)


def standardised_terms(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, TermSettings]:
    """Return the terms of an objective that standardise, by name."""
    terms = objective.check(settings) if settings else {}
    return {name: term for name, term in terms.items() if term.standardize != "none"}


def standardizers(
    settings: Mapping[str, Mapping[str, Any]], cache: Cache | None, shapes: Mapping[str, Shape], gpu: bool = False
) -> dict[str, Standardizer]:
    """Return the standardizers of an objective's terms, by the terms' names, from the teacher's cache.

    `shapes` are those of one image's outputs, by the names of `Seen`. With `gpu`, a covariance that is not stored yet
    is computed on the GPU. Raises UserError if student and teacher have different channels.
    """
    made: dict[str, Standardizer] = {}
    for name, term in standardised_terms(settings).items():
        assert term.standardize != "none"
        where = f"objective.{name}.standardize={term.standardize}"
        if cache is None:
            raise UserError(f"{where}: the statistics come from a cache, and this teacher has none; set it to none")
        student, teacher = (objective.shapes_of(term.output, shapes)[side] for side in ("student", "teacher"))
        if student and teacher and student[0] != teacher[0]:
            raise UserError(
                f"{where}: the student's {term.output} has {student[0]} channels, the teacher's {teacher[0]}, so the "
                f"student cannot learn them in the same units; choose a student of the teacher's size, or set it to "
                f"none"
            )
        made[name] = statistics(cache, term.output, term.padding, term.standardize, gpu)
    return made


def teacher_scales(student: nn.Module, terms: Objective) -> dict[str, TeacherScale]:
    """Return the map to the teacher's scale for each of the student's outputs that a term standardises, by name."""
    scales: dict[str, TeacherScale] = {}
    for name, term in terms.items():
        if term.standardizer is not None:
            output, where = term.settings.output.rpartition(".")[2], f"objective.{name}.standardize"
            scales.setdefault(output, TeacherScale(last_layer(student, output), term.standardizer, where))
    return scales


def unfold_loaded(
    scales: Mapping[str, TeacherScale], student: nn.Module, settings: Mapping[str, Any], seed: int
) -> None:
    """Bring last layers that were loaded by `student.pretrained` into the units of the standardised targets.

    Such a layer gives the teacher's scale already, unlike one that was drawn. It is told from that by building the
    student once more from another seed.
    """
    if not scales or settings.get("pretrained") in (None, "none"):
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        other = students.build(settings)
    for output, scale in scales.items():
        if _is_loaded(scale.layer, last_layer(other, output)):
            scale.unfold()


def _is_loaded(layer: nn.Module, other: nn.Module) -> bool:
    weight, same = layer.weight, torch.equal(layer.weight, other.weight)  # type: ignore[arg-type]
    return same and isinstance(weight, Tensor) and not bool((weight == 1).all())  # a norm's initial weight is one


def _check_distance(term: TermSettings, where: str) -> None:
    name = term.distance["name"]
    if name in LOGITS:
        raise UserError(
            f"{where}: distance {name} takes the softmax of the logits themselves, which means nothing in other units; "
            f"set it to none, or compare the logits by mse"
        )
    if name in PROJECTED or term.distance.get("base") == "fitnet":
        raise UserError(
            f"{where}: distance {name} learns a projection to the teacher's output, so the student's own has no units "
            f"to fold; set it to none, or compare by mse, cosine or balanced"
        )


def _check_student(settings: Mapping[str, Any], term: TermSettings, where: str) -> None:
    """Raise a UserError if the class of the student, as far as its builder states it, has no `last_layers`."""
    builder = resolve(str(settings.get("name")), students.STUDENTS, "student.name")
    built = _built(builder)
    if built is not None and built is not nn.Module and not hasattr(built, "last_layers"):
        raise UserError(
            f"{where}: student.name={settings['name']} does not state the last layer of {term.output}, into which the "
            f"standardised target is folded; give its class a property `last_layers`, or set it to none"
        )


def _built(builder: Callable[..., Any]) -> type | None:
    if inspect.isclass(builder):
        return builder
    kind = typing.get_type_hints(builder).get("return")
    return kind if inspect.isclass(kind) else None


def _check_alike(name: str, term: TermSettings, terms: Mapping[str, TermSettings]) -> None:
    """Raise a UserError if another term standardises the same output in another way: the student has one last layer."""
    for other, settings in terms.items():
        same = settings.output.rpartition(".")[2] == term.output.rpartition(".")[2]
        if same and (settings.standardize, settings.padding) != (term.standardize, term.padding):
            raise UserError(
                f"objective.{name}.standardize={term.standardize} with padding={term.padding}, "
                f"objective.{other}.standardize={settings.standardize} with padding={settings.padding}: the student's "
                f"last layer of {term.output} learns in one kind of units; set both alike, or one of them to none"
            )
