"""Compare methods: train and evaluate several recipes over the same seeds, and write a paired table."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import fmdistill.cache as cache
from fmdistill import distill, recipe, stop
from fmdistill.cache import finished
from fmdistill.files import check_folder, write_whole
from fmdistill.launcher import processes
from fmdistill.logs import log
from fmdistill.pipeline import (
    check_before,
    evaluate_parts,
    judged_parts,
    protocols_by_teacher,
    side_by_side,
    variants,
)
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.report import paired, rows
from fmdistill.several import by_teacher


def run(names: Sequence[str], seeds: int, overrides: Sequence[str] = (), jobs: int = 1) -> Path:
    """Run recipes over the seeds 0 to `seeds` - 1, evaluate each run, and write a paired table; return its path.

    `jobs` runs are trained and evaluated at the same time, each in a process of its own; their results are those of one
    after the other with the same number of threads (OMP_NUM_THREADS).

    A study's name means all its methods, and the first recipe of all is the baseline. The run of a recipe with
    out=FOLDER and seed S is in FOLDER/seed-S; with out=FOLDER in `overrides`, it is in FOLDER/METHOD/seed-S, and the
    table in FOLDER. Finished runs are not repeated, so an interrupted comparison continues. Recipes share their caches.
    """
    if processes()[1] > 1:
        raise UserError("compare: each of its trainings is one process; start it without a launcher")
    expanded = list(dict.fromkeys(variant for name in names for variant in recipe.variants(name)))  # without duplicates
    if seeds < 1 or len(expanded) < 2:
        raise UserError(
            f"compare: {len(expanded)} recipes over {seeds} seeds; give two recipes or a study, and one seed or more"
        )
    if jobs < 1:
        raise UserError(f"compare: --jobs {jobs}: expected the number of runs at the same time, 1 or more")
    planned = _plan(expanded, seeds, overrides)
    table = _check(planned)
    first = [part for by_seed in planned.values() for part in by_teacher(by_seed[0]).values()]
    for settings in {str((run.cache, run.teacher, run.images)): run for run in first}.values():
        if settings.teacher is not None and not finished.is_live(settings.teacher):
            cache.run(settings)
    short = variants.short_names(expanded)
    ordered = [(name, seed) for seed in range(seeds) for name in planned]
    if jobs > 1:
        side_by_side.run([planned[name][seed] for name, seed in ordered], jobs, evaluate=True)
    else:
        for name, seed in stop.between(ordered):
            log.info("%s, seed %d", short[name], seed)
            distill.run(planned[name][seed])
            evaluate_parts(planned[name][seed])
    _write(table, {short[name]: by_seed for name, by_seed in planned.items()})
    return table


def _plan(names: Sequence[str], seeds: int, overrides: Sequence[str]) -> dict[str, list[Recipe]]:
    """Return each recipe's runs by seed. Raises UserError if two recipes are alike or share a folder."""
    folder = "".join(override.removeprefix("out=") for override in overrides if override.startswith("out="))
    overrides = [*(override for override in overrides if not override.startswith("out=")), "seed=0"]
    loaded = variants.load(names, overrides)
    variants.check_distinct(loaded, overrides)
    outs: dict[str, str] = {}
    for name, settings in loaded.items():
        out = os.path.normpath(Path(folder) / Path(settings.out).name if folder else settings.out)
        if out in outs:
            raise UserError(f"compare: {outs[out]} and {name} write to the folder {out}; give each its own `out`")
        outs[out] = name
    return {
        name: [dataclasses.replace(loaded[name], seed=seed, out=f"{out}/seed-{seed}") for seed in range(seeds)]
        for out, name in outs.items()
    }


def _check(planned: Mapping[str, Sequence[Recipe]]) -> Path:
    """Check every run before any work begins; return the path of the table."""
    first = {name: by_seed[0] for name, by_seed in planned.items()}
    for name, settings in first.items():
        with variants.named(name):
            check_before(settings)
    outs = [Path(settings.out) for settings in first.values()]
    absolute = any(out.is_absolute() for out in outs)
    table = Path(os.path.commonpath([out.absolute() if absolute else out for out in outs])) / "comparison.md"
    check_folder(table.parent, "the comparison")
    protocols_of = {name: settings.protocols for name, settings in first.items()}
    baseline = next(iter(protocols_of))
    for name, protocols in protocols_of.items():
        if protocols != protocols_of[baseline] or not protocols:
            raise UserError(
                f"compare: {name} has protocols={protocols} and {baseline} {protocols_of[baseline]}: different "
                f"protocols, or none; set the same for all, such as 'protocols=[eval/FILE.yaml]'"
            )
    for by_seed in planned.values():
        _judged(by_seed[0])
        for settings in by_seed:
            distill.check_claim(settings)
    return table


def _judged(settings: Recipe) -> Recipe:
    """Return the part of a recipe of several teachers that the protocols judge. Raises UserError if it is not one."""
    judged = [name for name, protocols in protocols_by_teacher(settings).items() if protocols]
    if len(judged) > 1:
        raise UserError(
            f"compare: protocols={settings.protocols} judge the students of {len(judged)} teachers, "
            f"{' and '.join(judged)}; set those of one of them, and compare the others by another command"
        )
    return judged_parts(settings)[judged[0]]


def _write(table: Path, planned: Mapping[str, Sequence[Recipe]]) -> None:
    runs = {name: rows.read_runs([_judged(settings).out for settings in by_seed]) for name, by_seed in planned.items()}
    protocols = [Path(path).stem for path in next(iter(planned.values()))[0].protocols]
    by_protocol = {name: paired.compare(runs, name) for name in protocols}
    table.parent.mkdir(parents=True, exist_ok=True)
    write_whole(table, "\n\n".join(paired.text(lines) for lines in by_protocol.values()) + "\n")
    plain = {name: [dataclasses.asdict(line) for line in lines] for name, lines in by_protocol.items()}
    write_whole(table.with_suffix(".json"), json.dumps(plain, indent=1))
