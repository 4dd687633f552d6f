"""The evaluate stage: a checkpoint -> numbers, by a protocol that its file states."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fmdistill import recipe as recipes
from fmdistill.distill import student as students
from fmdistill.evaluate import colour_baseline, retrieval, subjects, top1, zeroshot
from fmdistill.evaluate.colour_baseline import CaptionedZeroshot
from fmdistill.evaluate.grid_miou import GridMiou
from fmdistill.evaluate.retrieval import Retrieval
from fmdistill.evaluate.scene_miou import SceneMiou
from fmdistill.evaluate.top1 import Top1
from fmdistill.evaluate.zeroshot import Zeroshot
from fmdistill.files import write_whole
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, bind

Judge = Callable[[Any, Recipe, Mapping[str, nn.Module]], tuple[dict[str, float], dict]]

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
    """Raise a UserError where the recipe's cache cannot serve the protocol, without touching data."""
    if isinstance(protocol.settings, GridMiou):
        subjects.check_grid(protocol.settings, recipe)


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
    """Judge a run's student, or a checkpoint file, and keep the result.

    A run keeps it as evaluation/PROTOCOL.json. A checkpoint needs `recipe=RECIPE` among the overrides, which names the
    images and the cache to judge it by, and its result is written beside it. The other overrides are the protocol's.
    """
    given = recipes.parse_overrides(overrides)
    trust = str(given.pop("trust", "")).lower() == "true"
    trusted = ["trust=true"] if trust else []
    named = given.pop("recipe", None)
    judged = load(protocol, given)
    if Path(subject).is_file():
        if named is None:
            raise UserError(f"{subject}: a checkpoint file needs recipe=RECIPE, whose images and cache it is judged by")
        recipe, out = recipes.load(named, trusted), Path(subject).parent / f"{Path(subject).stem}.evaluation"
        student = students.load_checkpoint(recipe.student, Path(subject))
    else:
        recipe = recipes.load(named, trusted) if named else recipes.load_saved(subject, trusted)
        student, out = students.load_student(subject, trust), Path(subject) / "evaluation"
    metrics, details = judged.judge(judged.settings, recipe, {"student": student})
    _keep(out, protocol, judged, metrics, details)
    return metrics


def kept(protocol: str | Path, run: str | Path) -> bool:
    """Return whether the run keeps a result by this protocol, with the settings that it has now."""
    path = Path(run) / "evaluation" / f"{Path(protocol).stem}.json"
    try:
        return json.loads(path.read_text())["protocol"] == json.loads(json.dumps(load(protocol).to_json()))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_together(protocol: str | Path, runs: Sequence[str | Path], trust: bool = False) -> None:
    """Judge several runs of one cache, the teacher's masks and the floors made once for all; keep each run's result."""
    judged, loaded = load(protocol), [recipes.load_saved(run, ["trust=true"] if trust else []) for run in runs]
    for part in ("cache", "images", "student"):  # the cases come from the first two, the untrained floor from the last
        if len({str(dataclasses.asdict(recipe)[part]) for recipe in loaded}) != 1:
            raise UserError(f"{', '.join(map(str, runs))}: their recipes' `{part}` differ; evaluate them one by one")
    names = {f"run {number}": run for number, run in enumerate(runs)}
    models = {name: students.load_student(run, trust) for name, run in names.items()}
    metrics, details = judged.judge(judged.settings, loaded[0], models)
    for name, run in names.items():
        others = set(names) - {name}
        own = {_renamed(k, name): v for k, v in metrics.items() if k.split("/")[0] not in others}
        rows = [{**r, "student": _renamed(r["student"], name)} for r in details["rows"] if r["student"] not in others]
        _keep(Path(run) / "evaluation", protocol, judged, own, {"rows": rows})


def _renamed(key: str, name: str) -> str:
    return f"student{key.removeprefix(name)}" if key.split("/")[0] == name else key


def _keep(out: Path, protocol: str | Path, judged: Protocol, metrics: dict[str, float], details: dict) -> None:
    name, masks = Path(protocol).stem, details.pop("masks", None)
    write(out / f"{name}.json", {"protocol": judged.to_json(), "metrics": metrics, **details})
    if masks is not None:
        write(out / f"{name}.masks.json", masks)
    log.info("%s: %s", out / f"{name}.json", ", ".join(f"{k} {v:.4f}" for k, v in list(metrics.items())[:4]))


def write(path: Path, content: Any) -> None:
    """Write JSON to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1))
