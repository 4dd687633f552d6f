"""The evaluate stage: score a checkpoint by a protocol file; the result is rows of numbers."""

import dataclasses
import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fmdistill import recipe as recipes
from fmdistill.distill import student as students
from fmdistill.evaluate import results, stored_results
from fmdistill.evaluate.results import Judged, Result, Row
from fmdistill.evaluate.stored_results import Partial
from fmdistill.files import check_folder, write_whole
from fmdistill.logs import log
from fmdistill.predict import artefact
from fmdistill.predict.checkpoint_file import whole_sam
from fmdistill.predict.onnx_student import open_student
from fmdistill.recipe import Overrides, Recipe
from fmdistill.registry import UserError, bind, convert, resolve
from fmdistill.stages import last_stage

EVALUATORS: dict[str, Any] = {
    "grid_miou": "fmdistill.evaluate.grid_miou:GridMiou",
    "prompted_miou": "fmdistill.evaluate.prompted:PromptedMiou",
    "everything": "fmdistill.evaluate.everything:Everything",
    "scene_miou": "fmdistill.mini.scene_miou:SceneMiou",
    "region_agreement": "fmdistill.mini.region_agreement:RegionAgreement",
    "coco_ap": "fmdistill.evaluate.average_precision:CocoAp",
    "calibration": "fmdistill.evaluate.calibration:Calibration",
    "cosine": "fmdistill.evaluate.cosine:TeacherSimilarity",
    "knn": "fmdistill.evaluate.knn:Knn",
    "zeroshot": "fmdistill.evaluate.zeroshot:Zeroshot",
    "retrieval": "fmdistill.evaluate.retrieval:Retrieval",
    "clip_suite": "fmdistill.evaluate.clip_suite:ClipSuite",
    "latency": "fmdistill.evaluate.latency:Latency",
    "captioned_zeroshot": "fmdistill.mini.colour_baseline:CaptionedZeroshot",
    "top1": "fmdistill.evaluate.top1:Top1",
}


class Evaluator(typing.Protocol):
    """A frozen dataclass whose fields are the settings of its protocols; see docs/evaluators.md.

    Optional members: `check(recipe)` raises a UserError, before any work, if it cannot judge the recipe's run, and
    `check_images(recipe)` does so after looking at the first image and the class folders; `metrics` and `dimensions`
    describe its rows; `splits` are the splits of the images that it reads; `inputs()` returns JSON of what it reads
    instead of the protocol's or the recipe's images, on which a stored result then depends; with `own_decoder`, a
    checkpoint file of a whole SAM is judged with its own mask decoder; `store_in(run, weights, result)`, called if the
    user sets `store=true`, writes what was fitted into the run's folder.
    """

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module]) -> Judged:
        """Return rows and details; a third parameter `partial`, if there is one, receives a `Partial`."""
        ...


@dataclasses.dataclass(frozen=True)
class Protocol:
    """An evaluator with the settings of a protocol file, and the evaluator's name as written in the file."""

    name: str
    evaluator: Any  # an Evaluator, and a dataclass

    def to_json(self) -> dict[str, Any]:
        """Return the name and every setting as one mapping."""
        return {"name": self.name, **dataclasses.asdict(self.evaluator)}


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Protocol:
    """Load the protocol file at `path`; `overrides` replace settings of the file. Raises UserError for wrong ones."""
    stored = recipes.read_yaml(recipes.locate(path))
    settings = recipes.merge(stored, overrides or {})
    try:
        settings = _first_look(settings, stored, str(path))
        evaluator = bind(settings, EVALUATORS, str(path))()
        _check_evaluator(evaluator, str(settings["name"]))
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    return Protocol(str(settings["name"]), evaluator)


def _first_look(settings: dict[str, Any], stored: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the settings with a number as `images` moved to `limit` if the evaluator's `images` is a source."""
    count = settings.get("images")
    if not str(count).isdigit() or not isinstance(settings.get("name"), str):
        return settings
    evaluator = resolve(settings["name"], EVALUATORS, f"{path}.name")
    if "limit" not in inspect.signature(evaluator).parameters:
        return settings
    return {**settings, "images": stored.get("images"), "limit": count}


def _check_evaluator(evaluator: Any, name: str) -> None:
    kind = type(evaluator).__name__
    if not dataclasses.is_dataclass(evaluator):
        raise UserError(f"name={name}: is a {kind}; an evaluator is a dataclass, whose fields are its settings")
    if not callable(getattr(evaluator, "judge", None)):
        raise UserError(
            f"name={name}: {kind} has no method judge(self, recipe, students) -> (rows, details), which every "
            f"evaluator needs; docs/evaluators.md has an example"
        )


def check(protocol: Protocol, recipe: Recipe) -> None:
    """Raise a UserError if the recipe alone, without its images, shows that the protocol cannot judge its run."""
    if hasattr(protocol.evaluator, "check"):
        protocol.evaluator.check(recipe)


def check_images(protocol: Protocol, recipe: Recipe) -> None:
    """Raise a UserError if the first validation image or the class folders lack what the protocol needs."""
    if hasattr(protocol.evaluator, "check_images"):
        protocol.evaluator.check_images(recipe)


def run(protocol: str | Path, subject: str | Path, overrides: Overrides = ()) -> list[Row]:
    """Evaluate a student: a run's, an exported ONNX folder's or a checkpoint file's; store the result, return its rows.

    A stored result is reused. That of a run is RUN/evaluation/PROTOCOL.json. A folder or a file needs `recipe=RECIPE`
    among the overrides for its images and its cache, and its result is stored beside it. `store=true` also stores in
    the run what the evaluator fitted. All other overrides but `trust` are the protocol's.
    """
    settings = recipes.parse_overrides(overrides)
    trust = str(settings.pop("trust", "")).lower() == "true"
    trusted = ["trust=true"] if trust else []
    recipe_path, stores = settings.pop("recipe", None), convert(settings.pop("store", False), bool, "store")
    loaded, subject = load(protocol, settings), Path(subject).expanduser()
    exported = (subject / artefact.NAME).is_file()
    if subject.is_file() or exported:
        if recipe_path is None:
            kind = "an exported folder" if exported else "a checkpoint file"
            raise UserError(
                f"{subject}: is {kind}; add recipe=RECIPE, whose images and cache it is to be evaluated with, such as "
                f"recipe=RUN/recipe.yaml"
            )
        name = subject.name if exported else subject.stem
        recipe, out = last_stage(recipes.load(recipe_path, trusted)), subject.parent / f"{name}.evaluation"
        weights = subject / artefact.NAME if exported else subject
    else:
        own = recipes.load(recipe_path, trusted) if recipe_path else recipes.load_saved(subject, trusted)
        recipe = last_stage(own)
        weights, out = students.weights_path(subject), subject / "evaluation"
    check(loaded, recipe)
    if stores and not hasattr(loaded.evaluator, "store_in"):
        raise UserError(f"store=true: {loaded.name} fits nothing that a run could store; remove it")
    if stores and (subject.is_file() or exported):
        raise UserError(f"store=true: writes into a run, and {subject} is none; evaluate the run")
    path = out / f"{Path(protocol).stem}.json"
    state = _state(loaded, recipe, {"student": weights})
    if (rows := stored_results.read_rows(path, state)) is not None:
        log.info("%s: judged already", path)
        if stores:
            loaded.evaluator.store_in(subject, weights, json.loads(path.read_text()))
        return rows
    check_folder(out, "the result")
    if exported:
        student: nn.Module = _open_exported(subject, Path(recipe_path or ""), trust)
    elif weights == subject:
        whole = whole_sam(subject) if getattr(loaded.evaluator, "own_decoder", False) else None
        student = whole or students.load_checkpoint(recipe.student, subject)
    else:
        student = students.load_student(subject, trust)
    rows, details = _call(loaded, recipe, {"student": student}, path, state)
    _store(path, loaded, rows, details, state)
    if stores:
        loaded.evaluator.store_in(subject, weights, json.loads(path.read_text()))
    return rows


def _open_exported(folder: Path, recipe_path: Path, trust: bool) -> nn.Module:
    """Return an exported encoder, with the mask decoder that was trained with it, if any, from the recipe's run."""
    student = open_student(artefact.read(folder))
    if student.artefact.source.get("own_head"):
        run = recipe_path.expanduser().parent
        head = students.own_head(students.load_student(run, trust)) if (run / students.WEIGHTS).is_file() else None
        if head is None:
            raise UserError(
                f"{folder}: was exported from a run that trained a mask decoder of its own, which protocols take from "
                f"that run; add recipe=RUN/recipe.yaml of the exported run"
            )
        setattr(student, students.PROMPT_HEAD, head)
    return student


def run_together(protocol: str | Path, runs: Sequence[str | Path], trust: bool = False) -> None:
    """Evaluate several runs of one cache together, computing the teacher's masks once, and store each run's result."""
    loaded = load(protocol)
    run_recipes = [recipes.load_saved(run, ["trust=true"] if trust else []) for run in runs]
    recipe = run_recipes[0]
    for part in ("cache", "images", "student"):  # the cases come from the first two, the untrained floor from the last
        if len({str(dataclasses.asdict(run_recipe)[part]) for run_recipe in run_recipes}) != 1:
            raise UserError(f"{', '.join(map(str, runs))}: their recipes' `{part}` differ; evaluate them one by one")
    check(loaded, recipe)
    names, stem = {f"run {number}": Path(run) for number, run in enumerate(runs)}, Path(protocol).stem
    weights = {name: students.weights_path(run) for name, run in names.items()}
    states = {name: _state(loaded, recipe, {"student": path}) for name, path in weights.items()}
    paths = {name: run / "evaluation" / f"{stem}.json" for name, run in names.items()}
    if all(stored_results.read_rows(paths[name], state) is not None for name, state in states.items()):
        log.info("%s: judged already", ", ".join(map(str, paths.values())))
        return
    models = {name: students.load_student(run, trust) for name, run in names.items()}
    rows, details = _call(loaded, recipe, models, paths["run 0"], _state(loaded, recipe, weights))
    details.pop("masks", None)  # each entry holds one point's masks of all runs
    for name, path in paths.items():
        others = set(names) - {name}
        run_details = {key: _of_subject(part, name, others) for key, part in details.items()}
        _store(path, loaded, _of_subject(rows, name, others), run_details, states[name])


def _state(protocol: Protocol, recipe: Recipe, weights: Mapping[str, Path]) -> dict[str, Any]:
    splits = getattr(protocol.evaluator, "splits", ("validation",))
    inputs = protocol.evaluator.inputs() if hasattr(protocol.evaluator, "inputs") else None
    return stored_results.state(protocol.to_json(), recipe, weights, splits, inputs)


def _call(
    protocol: Protocol, recipe: Recipe, models: Mapping[str, nn.Module], path: Path, state: Mapping[str, Any]
) -> Judged:
    """Call the evaluator; resume from the partial results beside the result's `path` if it accepts `partial`."""
    judge, partial = protocol.evaluator.judge, {}
    if "partial" in inspect.signature(judge).parameters:
        partial["partial"] = Partial.open(path.with_suffix(".partial.jsonl"), state)
    return results.check(judge(recipe, models, **partial), protocol.name)


def _of_subject(part: Any, name: str, others: set[str]) -> Any:
    """Return rows or details without those of the subjects `others`, and with `name` as the student."""
    if not isinstance(part, list):
        return part
    subjects = [entry.get("subject") if isinstance(entry, dict) else None for entry in part]
    return [
        {**entry, "subject": results.STUDENT} if subject == name else entry
        for entry, subject in zip(part, subjects, strict=True)
        if subject not in others
    ]


def _store(path: Path, protocol: Protocol, rows: list[Row], details: dict, state: Mapping[str, Any]) -> None:
    masks = details.pop("masks", None)
    if masks is not None:
        write(path.with_suffix(".masks.json"), masks)
    metrics, dimensions = (dict(getattr(protocol.evaluator, name, {})) for name in ("metrics", "dimensions"))
    write(path, {**Result(protocol.to_json(), rows, metrics, dimensions).to_json(), **details, "of": state})
    path.with_suffix(".partial.jsonl").unlink(missing_ok=True)
    log.info("%s: %s", path, "; ".join(map(results.line, rows[:4])))


def write(path: Path, content: Any) -> None:
    """Write JSON to `path` atomically, creating its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1))
