"""The evaluate stage: a checkpoint -> rows of numbers, by a protocol that its file states."""

import dataclasses
import inspect
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fmdistill import recipe as recipes
from fmdistill.distill import student as students
from fmdistill.evaluate import kept, results
from fmdistill.evaluate.kept import Partial
from fmdistill.evaluate.results import Judged, Result, Row
from fmdistill.files import check_folder, write_whole
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, bind

EVALUATORS: dict[str, Any] = {
    "grid_miou": "fmdistill.evaluate.grid_miou:GridMiou",
    "scene_miou": "fmdistill.mini.scene_miou:SceneMiou",
    "cosine": "fmdistill.evaluate.cosine:Cosine",
    "knn": "fmdistill.evaluate.knn:Knn",
    "zeroshot": "fmdistill.evaluate.zeroshot:Zeroshot",
    "retrieval": "fmdistill.evaluate.retrieval:Retrieval",
    "captioned_zeroshot": "fmdistill.mini.colour_baseline:CaptionedZeroshot",
    "top1": "fmdistill.evaluate.top1:Top1",
}


class Evaluator(typing.Protocol):
    """A frozen dataclass whose fields are the protocol's settings; see docs/evaluators.md.

    It may also have `check(recipe)`, which raises a UserError for a recipe that it cannot judge, before any work,
    `check_images(recipe)`, the same from the first image and the class folders, `metrics` and `dimensions`, which state
    how its rows read, and `splits`, the images' splits that it reads.
    """

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module]) -> Judged:
        """Return rows and details; a parameter `partial` gets the results of single images before an interruption."""
        ...


@dataclasses.dataclass(frozen=True)
class Protocol:
    """An evaluator with the settings of a protocol file; `name` is the evaluator's, as the file has it."""

    name: str
    evaluator: Any  # an Evaluator, and a dataclass

    def to_json(self) -> dict[str, Any]:
        """Return the name and every setting."""
        return {"name": self.name, **dataclasses.asdict(self.evaluator)}


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Protocol:
    """Return the protocol at `path`, typed; `overrides` are settings on top of the file's."""
    settings = recipes.merge(recipes.read_yaml(recipes.locate(path)), overrides or {})
    try:
        evaluator = bind(settings, EVALUATORS, str(path))()
        _check_evaluator(evaluator, str(settings["name"]))
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    return Protocol(str(settings["name"]), evaluator)


def _check_evaluator(evaluator: Any, name: str) -> None:
    kind = type(evaluator).__name__
    if not dataclasses.is_dataclass(evaluator):
        raise UserError(f"name={name}: makes a {kind}; an evaluator is a dataclass, whose fields are its settings")
    if not callable(getattr(evaluator, "judge", None)):
        raise UserError(
            f"name={name}: {kind} has no method judge(self, recipe, students) -> (rows, details), by which an "
            f"evaluator judges; docs/evaluators.md shows one"
        )


def check(protocol: Protocol, recipe: Recipe) -> None:
    """Raise a UserError if the protocol cannot judge the recipe's run, as far as that is known without its images."""
    if hasattr(protocol.evaluator, "check"):
        protocol.evaluator.check(recipe)


def check_images(protocol: Protocol, recipe: Recipe) -> None:
    """Raise a UserError if the first validation image, or the class folders, lack what the protocol needs."""
    if hasattr(protocol.evaluator, "check_images"):
        protocol.evaluator.check_images(recipe)


def run(protocol: str | Path, subject: str | Path, overrides: Iterable[str] = ()) -> list[Row]:
    """Judge a run's student, or a checkpoint file, and store the result; return its rows, or those stored already.

    A run stores it as evaluation/PROTOCOL.json. A checkpoint needs `recipe=RECIPE` among the overrides, which names the
    images and the cache to judge it by, and its result is written beside it. The other overrides are the protocol's.
    """
    given = recipes.parse_overrides(overrides)
    trust = str(given.pop("trust", "")).lower() == "true"
    trusted = ["trust=true"] if trust else []
    named = given.pop("recipe", None)
    judged, subject = load(protocol, given), Path(subject).expanduser()
    if subject.is_file():
        if named is None:
            raise UserError(f"{subject}: a checkpoint file needs recipe=RECIPE, whose images and cache it is judged by")
        recipe, out = recipes.load(named, trusted), subject.parent / f"{subject.stem}.evaluation"
        weights = subject
    else:
        recipe = recipes.load(named, trusted) if named else recipes.load_saved(subject, trusted)
        weights, out = students.weights_path(subject), subject / "evaluation"
    check(judged, recipe)
    path = out / f"{Path(protocol).stem}.json"
    state = _state(judged, recipe, {"student": weights})
    if (stored := kept.stored(path, state)) is not None:
        log.info("%s: judged already", path)
        return stored
    check_folder(out, "the result")
    if weights == subject:
        student = students.load_checkpoint(recipe.student, subject)
    else:
        student = students.load_student(subject, trust)
    rows, details = _call(judged, recipe, {"student": student}, path, state)
    _store(path, judged, rows, details, state)
    return rows


def run_together(protocol: str | Path, runs: Sequence[str | Path], trust: bool = False) -> None:
    """Judge several runs of one cache together, the teacher's masks made once for all; store each run's result."""
    judged, loaded = load(protocol), [recipes.load_saved(run, ["trust=true"] if trust else []) for run in runs]
    for part in ("cache", "images", "student"):  # the cases come from the first two, the untrained floor from the last
        if len({str(dataclasses.asdict(recipe)[part]) for recipe in loaded}) != 1:
            raise UserError(f"{', '.join(map(str, runs))}: their recipes' `{part}` differ; evaluate them one by one")
    check(judged, loaded[0])
    names, stem = {f"run {number}": Path(run) for number, run in enumerate(runs)}, Path(protocol).stem
    weights = {name: students.weights_path(run) for name, run in names.items()}
    states = {name: _state(judged, loaded[0], {"student": path}) for name, path in weights.items()}
    paths = {name: run / "evaluation" / f"{stem}.json" for name, run in names.items()}
    if all(kept.stored(paths[name], state) is not None for name, state in states.items()):
        log.info("%s: judged already", ", ".join(map(str, paths.values())))
        return
    models = {name: students.load_student(run, trust) for name, run in names.items()}
    rows, details = _call(judged, loaded[0], models, paths["run 0"], _state(judged, loaded[0], weights))
    details.pop("masks", None)  # those of all runs, in one entry a point
    for name, path in paths.items():
        others = set(names) - {name}
        own = {key: _of_subject(part, name, others) for key, part in details.items()}
        _store(path, judged, _of_subject(rows, name, others), own, states[name])


def _state(judged: Protocol, recipe: Recipe, weights: Mapping[str, Path]) -> dict[str, Any]:
    splits = getattr(judged.evaluator, "splits", ("validation",))
    return kept.state(judged.to_json(), recipe, weights, splits)


def _call(
    judged: Protocol, recipe: Recipe, models: Mapping[str, nn.Module], path: Path, state: Mapping[str, Any]
) -> Judged:
    """Call the judge; one that takes `partial` goes on where it was stopped, by the file beside the result's `path`."""
    judge, partial = judged.evaluator.judge, {}
    if "partial" in inspect.signature(judge).parameters:
        partial["partial"] = Partial.open(path.with_suffix(".partial.jsonl"), state)
    return results.check(judge(recipe, models, **partial), judged.name)


def _of_subject(part: Any, name: str, others: set[str]) -> Any:
    """Return rows or details without those of the subjects `others`, and with `name` as the student."""
    if not isinstance(part, list):
        return part
    subjects = [one.get("subject") if isinstance(one, dict) else None for one in part]
    return [
        {**one, "subject": results.STUDENT} if subject == name else one
        for one, subject in zip(part, subjects, strict=True)
        if subject not in others
    ]


def _store(path: Path, judged: Protocol, rows: list[Row], details: dict, state: Mapping[str, Any]) -> None:
    masks = details.pop("masks", None)
    if masks is not None:
        write(path.with_suffix(".masks.json"), masks)
    metrics, dimensions = (dict(getattr(judged.evaluator, name, {})) for name in ("metrics", "dimensions"))
    write(path, {**Result(judged.to_json(), rows, metrics, dimensions).to_json(), **details, "of": state})
    path.with_suffix(".partial.jsonl").unlink(missing_ok=True)
    log.info("%s: %s", path, "; ".join(map(results.line, rows[:4])))


def write(path: Path, content: Any) -> None:
    """Write JSON to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1))
