"""The evaluate stage: a checkpoint -> numbers, by a protocol that its file states."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fmdistill import recipe as recipes
from fmdistill.distill import student as students
from fmdistill.evaluate import colour_baseline, kept, retrieval, subjects, text_side, top1, zeroshot
from fmdistill.evaluate.colour_baseline import CaptionedZeroshot
from fmdistill.evaluate.grid_miou import GridMiou
from fmdistill.evaluate.kept import Partial
from fmdistill.evaluate.retrieval import Retrieval
from fmdistill.evaluate.scene_miou import SceneMiou
from fmdistill.evaluate.top1 import Top1
from fmdistill.evaluate.zeroshot import Zeroshot
from fmdistill.files import check_folder, write_whole
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, bind

Judge = Callable[..., tuple[dict[str, float], dict]]  # of (settings, recipe, students by name), and partial=Partial

PROTOCOLS: dict[str, Callable[..., Any]] = {
    "grid_miou": GridMiou,
    "scene_miou": SceneMiou,
    "zeroshot": Zeroshot,
    "retrieval": Retrieval,
    "captioned_zeroshot": CaptionedZeroshot,
    "top1": Top1,
}
JUDGES: dict[type, Judge] = {
    GridMiou: subjects.judge_grid,
    SceneMiou: subjects.judge_scenes,
    Zeroshot: zeroshot.judge,
    Retrieval: retrieval.judge,
    CaptionedZeroshot: colour_baseline.judge,
    Top1: top1.judge,
}

# Who refuses a recipe that cannot be judged by such settings, before anything is cached or trained.
CHECKS: dict[type, Callable[[Any, Recipe], None]] = {
    GridMiou: subjects.check_grid,
    SceneMiou: subjects.check_scenes,
    Zeroshot: text_side.check,
    Retrieval: text_side.check,
    CaptionedZeroshot: text_side.check,
    Top1: top1.check,
}
IMAGE_CHECKS: dict[type, Callable[[Any, Recipe], None]] = {
    Zeroshot: zeroshot.check_images,
    Retrieval: retrieval.check_images,
    CaptionedZeroshot: lambda protocol, recipe: zeroshot.check_images(protocol.zeroshot, recipe),
    Top1: top1.check_images,
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How to judge: `name` as the file has it, `settings` typed, and the judge of such settings."""

    name: str
    settings: Any
    judge: Judge

    def to_json(self) -> dict[str, Any]:
        """Return the name and every setting."""
        return {"name": self.name, **dataclasses.asdict(self.settings)}


def check(protocol: Protocol, recipe: Recipe) -> None:
    """Raise a UserError if the protocol cannot judge the recipe's run, as far as that is known without its images."""
    refuse = CHECKS.get(type(protocol.settings))
    if refuse is not None:
        refuse(protocol.settings, recipe)


def check_images(protocol: Protocol, recipe: Recipe) -> None:
    """Raise a UserError if the first validation image, or the class folders, lack what the protocol needs."""
    refuse = IMAGE_CHECKS.get(type(protocol.settings))
    if refuse is not None:
        refuse(protocol.settings, recipe)


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Protocol:
    """Return the protocol at `path`, typed; `overrides` are settings on top of the file's."""
    given = recipes.merge(recipes.read_yaml(recipes.locate(path)), overrides or {})
    try:
        settings = bind(given, PROTOCOLS, str(path))()
        return Protocol(str(given["name"]), settings, _judge_of(settings, str(given["name"])))
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def _judge_of(settings: Any, name: str) -> Judge:
    kind = type(settings)
    if not dataclasses.is_dataclass(settings):
        raise UserError(
            f"name={name}: makes a {kind.__name__}; a protocol is a dataclass, whose fields are its settings"
        )
    if kind not in JUDGES:
        raise UserError(
            f"name={name}: {kind.__name__} has no judge; in its own module set fmdistill.evaluate.JUDGES"
            f"[{kind.__name__}] to a function (protocol, recipe, students by name) -> (metrics, details)"
        )
    return JUDGES[kind]


def run(protocol: str | Path, subject: str | Path, overrides: Iterable[str] = ()) -> dict[str, float]:
    """Judge a run's student, or a checkpoint file, and store the result; one that is stored already is returned.

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
        weights, out = students.weights_of(subject), subject / "evaluation"
    check(judged, recipe)
    path = out / f"{Path(protocol).stem}.json"
    state = kept.state(judged.to_json(), recipe, {"student": weights})
    if (stored := kept.stored(path, state)) is not None:
        log.info("%s: judged already", path)
        return stored
    check_folder(out, "the result")
    if weights == subject:
        student = students.load_checkpoint(recipe.student, subject)
    else:
        student = students.load_student(subject, trust)
    metrics, details = _call(judged, recipe, {"student": student}, path, state)
    _store(path, judged, metrics, details, state)
    return metrics


def run_together(protocol: str | Path, runs: Sequence[str | Path], trust: bool = False) -> None:
    """Judge several runs of one cache together, the teacher's masks made once for all; store each run's result."""
    judged, loaded = load(protocol), [recipes.load_saved(run, ["trust=true"] if trust else []) for run in runs]
    for part in ("cache", "images", "student"):  # the cases come from the first two, the untrained floor from the last
        if len({str(dataclasses.asdict(recipe)[part]) for recipe in loaded}) != 1:
            raise UserError(f"{', '.join(map(str, runs))}: their recipes' `{part}` differ; evaluate them one by one")
    names, stem = {f"run {number}": Path(run) for number, run in enumerate(runs)}, Path(protocol).stem
    weights = {name: students.weights_of(run) for name, run in names.items()}
    described = judged.to_json()
    states = {name: kept.state(described, loaded[0], {"student": path}) for name, path in weights.items()}
    paths = {name: run / "evaluation" / f"{stem}.json" for name, run in names.items()}
    if all(kept.stored(paths[name], state) is not None for name, state in states.items()):
        log.info("%s: judged already", ", ".join(map(str, paths.values())))
        return
    models = {name: students.load_student(run, trust) for name, run in names.items()}
    metrics, details = _call(judged, loaded[0], models, paths["run 0"], kept.state(described, loaded[0], weights))
    for name, path in paths.items():
        others = set(names) - {name}
        own = {_renamed(k, name): v for k, v in metrics.items() if k.split("/")[0] not in others}
        rows = [{**r, "student": _renamed(r["student"], name)} for r in details["rows"] if r["student"] not in others]
        _store(path, judged, own, {"rows": rows}, states[name])


def _call(
    judged: Protocol, recipe: Recipe, models: Mapping[str, nn.Module], path: Path, state: Mapping[str, Any]
) -> subjects.Judged:
    """Call the judge; one that takes `partial` goes on where it was stopped, by the file beside the result's `path`."""
    if "partial" not in inspect.signature(judged.judge).parameters:
        return judged.judge(judged.settings, recipe, models)
    partial = Partial.open(path.with_suffix(".partial.jsonl"), state)
    return judged.judge(judged.settings, recipe, models, partial=partial)


def _renamed(key: str, name: str) -> str:
    return f"student{key.removeprefix(name)}" if key.split("/")[0] == name else key


def _store(path: Path, judged: Protocol, metrics: dict[str, float], details: dict, state: Mapping[str, Any]) -> None:
    masks = details.pop("masks", None)
    if masks is not None:
        write(path.with_suffix(".masks.json"), masks)
    write(path, {"protocol": judged.to_json(), "metrics": metrics, **details, "of": state})
    path.with_suffix(".partial.jsonl").unlink(missing_ok=True)
    log.info("%s: %s", path, ", ".join(f"{k} {v:.4f}" for k, v in list(metrics.items())[:4]))


def write(path: Path, content: Any) -> None:
    """Write JSON to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1))
