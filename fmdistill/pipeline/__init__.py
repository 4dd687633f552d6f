"""The verbs that join stages: check, run, compare, demo."""

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fmdistill import cache, distill, evaluate, images, recipe, report
from fmdistill.backbones.device import pick_device
from fmdistill.cache import executors, teacher
from fmdistill.distill import objective, student, tasks
from fmdistill.distill.optim import OPTIMIZERS, SCHEDULES
from fmdistill.evaluate import teacher_score
from fmdistill.files import write_whole
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, bind
from fmdistill.report import paired, rows

TRUSTED = ["trust=true"]  # of a run that was checked to be of the recipe that the user gave
RECIPE_KEYS = {"extends", "out", "student", "task", "teacher"}  # a protocol has none of these
DEMO = {
    "sam": ("recipes/demo/sam_mse.yaml", "recipes/demo/sam_srw.yaml"),
    "clip": ("recipes/demo/clip_mse.yaml", "recipes/demo/clip_srw.yaml"),
}


def check(settings: Recipe) -> None:
    """Bind every component of a recipe and load its protocols, without touching data."""
    images.check(settings.images)
    live = teacher.is_live(settings.teacher)
    if (settings.teacher is None) != (settings.cache is None) and not live:
        raise UserError("teacher and cache: a recipe has both or neither; teacher.live=true needs no cache")
    if live and settings.cache is not None:
        raise UserError(
            "cache: ignored, since teacher.live=true caches nothing; leave it out (as a setting, cache=null)"
        )
    tasks.check(settings)
    trimmed = settings.cache is not None and settings.cache.trim
    if settings.teacher is not None:
        teacher.check(settings.teacher, trimmed, settings.cache is not None and settings.cache.similarity)
    if settings.cache is not None:
        executors.check(settings.cache.executor)
    if settings.objective or settings.teacher is not None:
        (objective.check_trimmed if trimmed else objective.check)(settings.objective)
    if settings.teacher is not None and teacher.only_vectors(settings.teacher):
        objective.check_vectors(settings.objective)
    student.check(settings.student)
    bind(settings.optimizer, OPTIMIZERS, "optimizer", context=("model",))
    bind(settings.schedule, SCHEDULES, "schedule")()
    for protocol in settings.protocols:
        evaluate.check(evaluate.load(protocol), settings)


def check_machine(settings: Recipe) -> None:
    """Raise a UserError unless this machine can train and judge as the recipe says, before anything is spent."""
    distill.check_machine(settings)
    for path in settings.protocols:
        pick_device(str(getattr(evaluate.load(path).settings, "device", "auto")), f"{path}: device")


def check_files(paths: Iterable[str], overrides: Sequence[str] = ()) -> list[str]:
    """Check recipes, each with `overrides`, and protocols by path, or all that ship; return their names."""
    names, recipes = list(paths) or shipped(), 0
    for name in names:
        try:
            if RECIPE_KEYS & recipe.read_yaml(recipe.locate(name)).keys():
                check(recipe.load(name, overrides))
                recipes += 1
            else:
                evaluate.load(name)
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    if overrides and not recipes:
        raise UserError(f"check: {overrides[0]}: a recipe's setting, and only protocols are given; name a recipe too")
    return names


def shipped() -> list[str]:
    """Return the recipes and protocols that come with the package."""
    package = Path(__file__).parent.parent
    base = package if (package / "recipes").is_dir() else package.parent
    found = [*base.glob("recipes/**/*.yaml"), *base.glob("eval/*.yaml")]
    return sorted(str(path.relative_to(base)) for path in found)


def run(settings: Recipe) -> dict[str, dict[str, float]]:
    """Cache, score the teacher on what its images carry, distil and evaluate; return the metrics by protocol.

    Of several training processes only the first evaluates; the others return {}.
    """
    check(settings)
    check_machine(settings)
    if settings.teacher is not None and not teacher.is_live(settings.teacher):
        cache.run(settings)
        _score_teacher(settings)
    out = distill.run(settings)
    if not is_main():
        return {}
    return {protocol: evaluate.run(protocol, out, TRUSTED) for protocol in settings.protocols}


def _score_teacher(settings: Recipe) -> None:
    if is_main():
        teacher_score.judge_teacher(settings, [evaluate.load(path).settings for path in settings.protocols])


def is_main() -> bool:
    """Return whether this process is the only one, or the first of those that a launcher started for training."""
    return os.environ.get("RANK", "0") == "0"


def evaluate_recipe(settings: Recipe) -> dict[str, dict[str, float]]:
    """Run the recipe's own protocols on its own run."""
    if not settings.protocols:
        raise UserError("this recipe names no protocols; give one: fmdistill evaluate PROTOCOL RUN")
    distill.check_run(settings, Path(settings.out))
    return {protocol: evaluate.run(protocol, settings.out, TRUSTED) for protocol in settings.protocols}


def compare(paths: Sequence[str], seeds: int, overrides: Sequence[str] = ()) -> Path:
    """Run several recipes over the seeds 0 to `seeds` - 1, judge each run, and write one paired table; return its path.

    The first recipe is the baseline. The run of a recipe with out=FOLDER and seed S lies in FOLDER/seed-S; what is
    there and finished is left as it is, so an interrupted comparison continues. The recipes share their caches.
    """
    if seeds < 1 or len(set(paths)) < 2:
        raise UserError(f"compare: {len(set(paths))} recipes over {seeds} seeds; give two recipes and one seed or more")
    planned = {path: [_seeded(path, seed, overrides) for seed in range(seeds)] for path in dict.fromkeys(paths)}
    names = _method_names(planned)
    first = [several[0] for several in planned.values()]
    for settings in first:
        check(settings)
        check_machine(settings)
    if any(one.protocols != first[0].protocols for one in first) or not first[0].protocols:
        raise UserError("compare: the recipes name different protocols, or none; what is compared is judged alike")
    for settings in {str((one.cache, one.teacher, one.images)): one for one in first}.values():
        if settings.teacher is not None and not teacher.is_live(settings.teacher):
            cache.run(settings)
    for seed in range(seeds):
        for path, several in planned.items():
            log.info("%s, seed %d", names[path], seed)
            out = distill.run(several[seed])
            for protocol in several[seed].protocols:
                if not evaluate.kept(protocol, out):
                    evaluate.run(protocol, out, TRUSTED)
    found = {names[path]: rows.read_runs([one.out for one in several]) for path, several in planned.items()}
    lines = {Path(one).stem: paired.compare(found, Path(one).stem) for one in first[0].protocols}
    table = Path(os.path.commonpath([one.out for one in first])) / "comparison.md"
    table.parent.mkdir(parents=True, exist_ok=True)
    write_whole(table, "\n\n".join(paired.text(some) for some in lines.values()) + "\n")
    plain = {name: [dataclasses.asdict(line) for line in some] for name, some in lines.items()}
    write_whole(table.with_suffix(".json"), json.dumps(plain, indent=1))
    return table


def _seeded(path: str, seed: int, overrides: Sequence[str]) -> Recipe:
    settings = recipe.load(path, [*overrides, f"seed={seed}"])
    return dataclasses.replace(settings, out=str(Path(settings.out) / f"seed-{seed}"))


def _method_names(planned: Mapping[str, Sequence[Recipe]]) -> dict[str, str]:
    """Return a short name for each recipe: its file's, or where two files share one, its whole path."""
    outs = [several[0].out for several in planned.values()]
    if len(set(outs)) < len(outs):
        raise UserError(f"compare: two recipes write to one folder, such as {outs[0]}; give each its own `out`")
    short = {path: Path(path).stem for path in planned}
    return short if len(set(short.values())) == len(short) else {path: path for path in planned}


def demo(kind: str = "sam", overrides: Sequence[str] = ()) -> Path:
    """Run the main job on the embedded default, with and without SRW from one cache; return the report's page."""
    if kind not in DEMO:
        raise UserError(f"demo {kind}: unknown; known: {', '.join(DEMO)}")
    started = time.monotonic()
    loaded = [recipe.load(path, overrides) for path in DEMO[kind]]
    for settings in loaded:
        check(settings)
        check_machine(settings)
    cache.run(loaded[0])
    _score_teacher(loaded[0])
    for settings in loaded:
        log.info("%s", settings.title)
        distill.run(settings)
    runs = [settings.out for settings in loaded]
    for protocol in loaded[0].protocols:
        evaluate.run_together(protocol, runs, trust=True)
    page = report.run(runs, f"report/demo_{kind}", trust=True)
    print(report.text(runs))
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes. Report: {page}")
    return page
