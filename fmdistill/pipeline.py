"""The verbs that join stages: check, run, demo."""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from fmdistill import cache, distill, evaluate, images, recipe, report
from fmdistill.cache.teacher import TEACHERS
from fmdistill.distill import objective
from fmdistill.distill.optim import OPTIMIZERS, SCHEDULES
from fmdistill.distill.student import STUDENTS
from fmdistill.distill.tasks import TASKS
from fmdistill.evaluate import teacher_score
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, bind

TRUSTED = ["trust=true"]  # of a run that was checked to be of the recipe that the user gave
RECIPE_KEYS = {"extends", "out", "student", "task", "teacher"}  # a protocol has none of these
DEMO = {
    "sam": ("recipes/demo/sam_mse.yaml", "recipes/demo/sam_srw.yaml"),
    "clip": ("recipes/demo/clip_mse.yaml", "recipes/demo/clip_srw.yaml"),
}


def check(settings: Recipe) -> None:
    """Bind every component of a recipe and load its protocols, without touching data."""
    images.check(settings.images)
    if (settings.teacher is None) != (settings.cache is None):
        raise UserError("teacher and cache: a recipe has both or neither")
    if settings.teacher is not None:
        bind(settings.teacher, TEACHERS, "teacher")
        objective.check(settings.objective)
    bind(settings.student, STUDENTS, "student")
    bind(settings.task, TASKS, "task", context=("recipe",))
    bind(settings.optimizer, OPTIMIZERS, "optimizer", context=("model",))
    bind(settings.schedule, SCHEDULES, "schedule")()
    for protocol in settings.protocols:
        evaluate.load(protocol)


def check_files(paths: Iterable[str]) -> list[str]:
    """Check recipes and protocols by path, or all that ship; return their names."""
    names = list(paths) or shipped()
    for name in names:
        try:
            if RECIPE_KEYS & recipe.read_yaml(recipe.locate(name)).keys():
                check(recipe.load(name))
            else:
                evaluate.load(name)
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    return names


def shipped() -> list[str]:
    """Return the recipes and protocols that come with the package."""
    package = Path(__file__).parent
    base = package if (package / "recipes").is_dir() else package.parent
    found = [*base.glob("recipes/**/*.yaml"), *base.glob("eval/*.yaml")]
    return sorted(str(path.relative_to(base)) for path in found)


def run(settings: Recipe) -> dict[str, dict[str, float]]:
    """Cache, score the teacher on what its images carry, distil and evaluate; return the metrics by protocol.

    Of several training processes only the first evaluates; the others return {}.
    """
    check(settings)
    if settings.teacher is not None:
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


def demo(kind: str = "sam", overrides: Sequence[str] = ()) -> Path:
    """Run the main job on the embedded default, with and without SRW from one cache; return the report's page."""
    if kind not in DEMO:
        raise UserError(f"demo {kind}: unknown; known: {', '.join(DEMO)}")
    started = time.monotonic()
    loaded = [recipe.load(path, overrides) for path in DEMO[kind]]
    for settings in loaded:
        check(settings)
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
