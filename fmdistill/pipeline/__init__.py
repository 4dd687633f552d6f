"""The verbs that join stages: check, run and demo here, compare, plan and bench in files of their own."""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from fmdistill import cache, distill, evaluate, images, recipe, report, stop, teachers
from fmdistill.backbones.device import pick_device
from fmdistill.cache import executors, finished
from fmdistill.cache.order import Batches
from fmdistill.distill import objective, student, tasks
from fmdistill.distill.optim import OPTIMIZERS, SCHEDULES
from fmdistill.distill.train import check_share, too_few_images, total_steps
from fmdistill.evaluate import teacher_score
from fmdistill.evaluate.results import Row
from fmdistill.files import check_folder
from fmdistill.launcher import processes
from fmdistill.logs import log
from fmdistill.pipeline import variants
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, bind
from fmdistill.settings import parse_recipe_name

TRUSTED = ["trust=true"]  # of a run that was checked to be of the recipe that the user gave
RECIPE_KEYS = {"extends", "out", "student", "task", "teacher"}  # a protocol has none of these
DEMO = {
    "sam": ("recipes/demo/sam_mse.yaml", "recipes/demo/sam_srw.yaml"),
    "clip": ("recipes/demo/clip_mse.yaml", "recipes/demo/clip_srw.yaml"),
}


def check(settings: Recipe) -> None:
    """Bind every component of a recipe and load its protocols, without touching data."""
    images.check(settings.images)
    live = finished.is_live(settings.teacher)
    if (settings.teacher is None) != (settings.cache is None) and not live:
        raise UserError("teacher and cache: a recipe has both or neither; teacher.live=true needs no cache")
    if live and settings.cache is not None:
        raise UserError(
            "cache: ignored, since teacher.live=true caches nothing; leave it out (as a setting, cache=null)"
        )
    tasks.check(settings)
    trimmed = settings.cache is not None and settings.cache.trim
    if settings.teacher is not None:
        teachers.check(settings.teacher, trimmed, settings.cache is not None and settings.cache.similarity)
    if settings.cache is not None:
        executors.check(settings.cache.executor)
    if settings.objective or settings.teacher is not None:
        (objective.check_trimmed if trimmed else objective.check)(settings.objective)
    if settings.teacher is not None and teachers.only_vectors(settings.teacher):
        objective.check_vectors(settings.objective)
    student.check(settings.student)
    bind(settings.optimizer, OPTIMIZERS, "optimizer", context=("model",))
    schedule = bind(settings.schedule, SCHEDULES, "schedule")()
    check_share(settings.train, processes=1)
    if settings.train.steps is not None:
        schedule(0, settings.train.steps)  # refuses more steps than it is made for
    for protocol in settings.protocols:
        evaluate.check(evaluate.load(protocol), settings)


def check_machine(settings: Recipe) -> None:
    """Raise a UserError unless this machine can train and judge as the recipe says, before anything is spent."""
    distill.check_machine(settings)
    for path in settings.protocols:
        pick_device(str(getattr(evaluate.load(path).evaluator, "device", "auto")), f"{path}: device")


def check_before(settings: Recipe) -> None:
    """Check a recipe as `check` does, and all that its images, their labels and its folder tell before work begins."""
    check(settings)
    check_machine(settings)
    check_share(settings.train, processes()[1])
    if not (Path(settings.out) / student.WEIGHTS).is_file():  # a finished run may be lent for reading only
        check_folder(settings.out, "the run")
    _check_amount(settings)
    for protocol in settings.protocols:
        evaluate.check_images(evaluate.load(protocol), settings)


def _check_amount(settings: Recipe) -> None:
    """Raise a UserError if the training images do not fill a batch, or are more epochs' steps than the schedule has."""
    listed, train = images.build(settings.images), settings.train
    horizon = train.epochs is not None and settings.schedule.get("horizon") is not None
    count = 0
    for shard in listed.shards():
        if shard.split == "train" and (horizon or count < train.batch_size):  # a tar's images are counted by reading it
            count += listed.source.count(shard.name) if shard.take is None else shard.take
    if count < train.batch_size:
        raise too_few_images(train.batch_size, count)
    if horizon:
        steps = total_steps(train, Batches((count,), train.batch_size, settings.seed, train.window))
        bind(settings.schedule, SCHEDULES, "schedule")()(0, steps)


def check_caching(settings: Recipe) -> None:
    """Check a recipe as `check` does; what would stop its training only, which may be meant, is logged."""
    check(settings)
    try:
        check_before(settings)
    except (UserError, OSError) as error:
        log.warning("caching goes on, but training by this recipe would be refused: %s", error)


def check_files(paths: Iterable[str], overrides: Sequence[str] = ()) -> list[str]:
    """Check recipes, each with `overrides`, studies and protocols by path, or all that ship; return their names."""
    names, recipes = [], 0
    for path in [file for given in paths for file in _files_of(given)] or shipped():
        if not RECIPE_KEYS & recipe.read_yaml(recipe.locate(parse_recipe_name(path).path)).keys():
            with variants.named(path):
                evaluate.load(path)
            names.append(path)
            continue
        loaded = variants.load(recipe.variants(path), overrides)
        for name, settings in loaded.items():
            with variants.named(name):
                check(settings)
        variants.check_distinct(loaded, overrides)
        names += loaded
        recipes += len(loaded)
    if overrides and not recipes:
        raise UserError(f"check: {overrides[0]}: a recipe's setting, and only protocols are given; name a recipe too")
    return names


def _files_of(path: str) -> list[str]:
    """Return the file at `path`; of a folder its recipe if it is a run or a cache, else all YAML files below it."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return [path]
    found = [folder / recipe.SAVED] if (folder / recipe.SAVED).is_file() else sorted(folder.rglob("*.yaml"))
    if not found:
        raise UserError(f"{path}: a folder without a recipe or protocol (*.yaml)")
    return list(map(str, found))


def shipped() -> list[str]:
    """Return the recipes and protocols that come with the package."""
    package = Path(__file__).parent.parent
    base = package if (package / "recipes").is_dir() else package.parent
    found = [*base.glob("recipes/**/*.yaml"), *base.glob("eval/*.yaml")]
    return sorted(str(path.relative_to(base)) for path in found)


def run(settings: Recipe) -> dict[str, list[Row]]:
    """Cache, score the teacher on what its images carry, distil and evaluate; return the rows by protocol.

    What is done already is left as it is. Of several training processes only the first evaluates; the others return {}.
    """
    check_before(settings)
    if settings.teacher is not None and not finished.is_live(settings.teacher):
        cache.run(settings)
        _score_teacher(settings)
    out = distill.run(settings)
    if not is_main():
        return {}
    return {protocol: evaluate.run(protocol, out, TRUSTED) for protocol in stop.between(settings.protocols)}


def _score_teacher(settings: Recipe) -> None:
    if is_main():
        teacher_score.judge_teacher(settings, [evaluate.load(path).evaluator for path in settings.protocols])


def is_main() -> bool:
    """Return whether this process is the only one, or the first of those that a launcher started for training."""
    return os.environ.get("RANK", "0") == "0"


def evaluate_recipe(settings: Recipe) -> dict[str, list[Row]]:
    """Run the recipe's own protocols on its own run."""
    if not settings.protocols:
        raise UserError("this recipe names no protocols; give one: fmdistill evaluate PROTOCOL RUN")
    distill.check_run(settings, Path(settings.out))
    return {protocol: evaluate.run(protocol, settings.out, TRUSTED) for protocol in stop.between(settings.protocols)}


def demo(kind: str = "sam", overrides: Sequence[str] = ()) -> Path:
    """Run the main job on the embedded default, with and without SRW from one cache; return the report's page."""
    if kind not in DEMO:
        raise UserError(f"demo {kind}: unknown; known: {', '.join(DEMO)}")
    started = time.monotonic()
    loaded = [recipe.load(path, overrides) for path in DEMO[kind]]
    for settings in loaded:
        check_before(settings)
    check_folder(f"report/demo_{kind}", "the report")
    cache.run(loaded[0])
    _score_teacher(loaded[0])
    for settings in stop.between(loaded):
        log.info("%s", settings.title)
        distill.run(settings)
    runs = [settings.out for settings in loaded]
    for protocol in stop.between(loaded[0].protocols):
        evaluate.run_together(protocol, runs, trust=True)
    page = report.run(runs, f"report/demo_{kind}", trust=True)
    print(report.text(runs))
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes. Report: {page}")
    return page
