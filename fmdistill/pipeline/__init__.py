"""The verbs that combine others: check and run in this file, the rest in their own files."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import fmdistill.cache as cache
import fmdistill.evaluate as evaluate
from fmdistill import distill, images, recipe, stop, teachers
from fmdistill.backbones.device import pick_device
from fmdistill.cache import executors, finished
from fmdistill.cache.order import Batches
from fmdistill.distill import captions, objective, student, targets, tasks
from fmdistill.distill.engine import check_share
from fmdistill.distill.optim import OPTIMIZERS, SCHEDULES
from fmdistill.distill.trackers import check_installed
from fmdistill.distill.train import too_few_images, total_steps
from fmdistill.evaluate import teacher_score
from fmdistill.evaluate.results import Row
from fmdistill.files import check_folder
from fmdistill.launcher import processes
from fmdistill.logs import log
from fmdistill.pipeline import variants
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, bind
from fmdistill.settings import parse_recipe_name
from fmdistill.several import by_teacher
from fmdistill.stages import by_stage, last_stage, naming

TRUSTED = ["trust=true"]  # for a run that was checked to be of the user's recipe
RECIPE_KEYS = {"extends", "out", "student", "task", "teacher"}  # settings that distinguish a recipe from a protocol


def check(settings: Recipe) -> None:
    """Check every setting of a recipe and of its protocols without touching data. Raises UserError if one is wrong."""
    images.check(settings.images)
    for name, stage in by_stage(settings).items():
        with naming(settings, name):
            _check_stage(stage)
    protocols_by_teacher(settings)


def _check_stage(settings: Recipe) -> None:
    """Check how one stage of a recipe is trained."""
    tasks.check(settings)
    for part in by_teacher(settings).values():
        _check_teacher(part)
    bind(settings.optimizer, OPTIMIZERS, "optimizer", context=("model",))
    schedule = bind(settings.schedule, SCHEDULES, "schedule")()
    check_share(settings.train, processes=1)
    check_installed(settings.train.trackers)
    if settings.train.steps is not None:
        schedule(0, settings.train.steps)  # raises if the schedule has fewer steps


def _check_teacher(settings: Recipe) -> None:
    """Check the teacher of a recipe, its cache, its student and the objective."""
    live = finished.is_live(settings.teacher)
    if (settings.teacher is None) != (settings.cache is None) and not live:
        raise UserError("teacher and cache: a recipe has both or neither; teacher.live=true needs no cache")
    if live and settings.cache is not None:
        raise UserError(
            "cache: ignored, since teacher.live=true caches nothing; remove it (on the command line, cache=null)"
        )
    trimmed = settings.cache is not None and settings.cache.trim
    if settings.teacher is not None:
        teachers.check(settings.teacher, trimmed, settings.cache is not None and settings.cache.similarity)
    if settings.cache is not None:
        executors.check(settings.cache.executor)
    if settings.objective or settings.teacher is not None:
        (objective.check_trimmed if trimmed else objective.check)(settings.objective)
    if settings.teacher is not None and teachers.makes_only_vectors(settings.teacher):
        objective.check_vectors(settings.objective)
    student.check(settings.student)
    targets.check(settings)
    captions.check(settings)


def protocols_by_teacher(settings: Recipe) -> dict[str, list[str]]:
    """Return the protocols that judge the student of each teacher, by the teacher's name; "" if it is the only one.

    With several teachers, a protocol judges each student that it can judge. Raises UserError if it can judge none. Of a
    recipe with stages, the student of the last one is judged.
    """
    parts = judged_parts(settings)
    chosen: dict[str, list[str]] = {name: [] for name in parts}
    for path in settings.protocols:
        protocol, errors = evaluate.load(path), []
        for name, part in parts.items():
            try:
                evaluate.check(protocol, part)
                chosen[name].append(path)
            except UserError as error:
                errors.append(error)
        if len(errors) == len(parts):
            raise errors[0]
    return chosen


def judged_parts(settings: Recipe) -> dict[str, Recipe]:
    """Return the recipe of each student that protocols judge, by the teacher's name, "" if it is the only one."""
    return by_teacher(last_stage(settings))


def check_machine(settings: Recipe) -> None:
    """Check that this machine can train and evaluate by the recipe. Raises UserError if not."""
    distill.check_machine(settings)
    for path in settings.protocols:
        pick_device(str(getattr(evaluate.load(path).evaluator, "device", "auto")), f"{path}: device")


def check_before(settings: Recipe) -> None:
    """Check a recipe like `check`, and also this machine, the images with their labels, and the run's folder."""
    check(settings)
    check_machine(settings)
    stages = by_stage(settings)
    for name, stage in stages.items():
        with naming(settings, name):
            check_share(stage.train, processes()[1])
    if not (Path(settings.out) / student.WEIGHTS).is_file():  # a finished run may be read-only
        check_folder(settings.out, "the run")
        name, first = next(iter(stages.items()))  # the others begin with the student of the one before
        with naming(settings, name):
            _check_start(first)
    for name, stage in stages.items():
        with naming(settings, name):
            _check_amount(stage)
    for name, protocols in protocols_by_teacher(settings).items():
        for protocol in protocols:
            evaluate.check_images(evaluate.load(protocol), judged_parts(settings)[name])


def _check_start(settings: Recipe) -> None:
    """Raise a UserError if the run is not finished and the weights that its students begin with do not exist."""
    if not (Path(settings.out) / student.WEIGHTS).is_file():
        for part in by_teacher(settings).values():
            student.check_start(part.student)


def _check_amount(settings: Recipe) -> None:
    """Raise a UserError if the training images do not fill a batch, or if the schedule has too few steps for them."""
    data, train = images.build(settings.images), settings.train
    horizon = train.epochs is not None and settings.schedule.get("horizon") is not None
    count = 0
    for shard in data.shards():
        if shard.split == "train" and (horizon or count < train.batch_size):  # counting a tar's images reads the tar
            count += data.source.count(shard.name) if shard.take is None else shard.take
    if count < train.batch_size:
        raise too_few_images(train.batch_size, count)
    if horizon:
        steps = total_steps(train, Batches((count,), train.batch_size, settings.seed, train.window))
        bind(settings.schedule, SCHEDULES, "schedule")()(0, steps)


def check_caching(settings: Recipe) -> None:
    """Check a recipe like `check`; only warn of errors that affect training but not caching."""
    check(settings)
    try:
        check_before(settings)
    except (UserError, OSError) as error:
        log.warning("caching continues, but training by this recipe will fail: %s", error)


def check_files(paths: Iterable[str], overrides: Sequence[str] = ()) -> list[str]:
    """Check recipes and studies, with `overrides`, and protocols by path; without paths, all those in the package.

    Returns their names. Raises UserError, beginning with the name, if one is wrong.
    """
    names, recipes = [], 0
    files = [file for path in paths for file in _files_of(path)]
    for path in files or recipe.shipped():
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
        raise UserError(f"check: {overrides[0]}: a setting of recipes, but only protocols are given; add a recipe")
    return names


def _files_of(path: str) -> list[str]:
    """Return [`path`] if it is a file; the saved recipe of a run or cache; else all YAML files below a folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return [path]
    saved = [folder / name for name in (recipe.STAGES, recipe.SAVED) if (folder / name).is_file()]
    files = saved[:1] or sorted(folder.rglob("*.yaml"))
    if not files:
        raise UserError(f"{path}: contains no recipe or protocol (*.yaml); name a file, or another folder")
    return list(map(str, files))


def run(settings: Recipe) -> dict[str, list[Row]]:
    """Run a recipe: cache, evaluate the teacher, distil and evaluate; return the rows by protocol.

    What is finished is not repeated. Only the first of several training processes evaluates; the others return {}.
    """
    check_before(settings)
    distill.check_claim(settings)
    for name, part in by_teacher(settings).items():
        if part.teacher is not None and not finished.is_live(part.teacher):
            cache.run(part)
            score_teacher(part, protocols_by_teacher(settings)[name])
    distill.run(settings)
    return evaluate_parts(settings) if is_main() else {}


def evaluate_parts(settings: Recipe) -> dict[str, list[Row]]:
    """Evaluate a recipe's run by its protocols, each teacher's student by those that judge it; return rows by protocol.

    If several students are judged by one protocol, the teacher's name follows the protocol's.
    """
    parts, chosen = judged_parts(settings), protocols_by_teacher(settings)
    judged = [(protocol, name) for name, protocols in chosen.items() for protocol in protocols]
    several = [protocol for protocol, _ in judged]
    return {
        f"{protocol} ({name})" if several.count(protocol) > 1 else protocol: evaluate.run(
            protocol, parts[name].out, TRUSTED
        )
        for protocol, name in stop.between(judged)
    }


def runs_of(settings: Recipe) -> list[str]:
    """Return the folders of a recipe's finished run: one, or one for each of several teachers."""
    return [part.out for part in by_teacher(settings).values()]


def score_teacher(settings: Recipe, protocols: Sequence[str]) -> None:
    """Judge the teacher by those of the protocols that have a score for it."""
    if is_main():
        teacher_score.judge_teacher(settings, [evaluate.load(path).evaluator for path in protocols])


def is_main() -> bool:
    """Return whether this is the only process, or the first of a launcher's processes."""
    return os.environ.get("RANK", "0") == "0"


def evaluate_recipe(settings: Recipe) -> dict[str, list[Row]]:
    """Evaluate the run of a recipe by the recipe's protocols; return the rows by protocol."""
    if not settings.protocols:
        raise UserError("protocols: this recipe has none; name one: fmdistill evaluate PROTOCOL RUN")
    distill.check_claim(settings)
    distill.check_run(last_stage(settings), Path(settings.out))  # raises if there is none
    return evaluate_parts(settings)
