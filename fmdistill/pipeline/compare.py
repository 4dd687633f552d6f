"""Compare methods: train and judge each of several recipes over the same seeds, and write one paired table."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fmdistill import cache, distill, evaluate, recipe, stop
from fmdistill.cache import finished
from fmdistill.files import check_folder, write_whole
from fmdistill.launcher import processes
from fmdistill.logs import log
from fmdistill.pipeline import TRUSTED, check_before, variants
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.report import paired, rows


def run(names: Sequence[str], seeds: int, overrides: Sequence[str] = ()) -> Path:
    """Run recipes over the seeds 0 to `seeds` - 1, judge each run, and write one paired table; return its path.

    A study's name stands for its methods, and the first recipe of all is the baseline. The run of a recipe with
    out=FOLDER and seed S lies in FOLDER/seed-S; with out=FOLDER among `overrides` in FOLDER/METHOD/seed-S, and the
    table in FOLDER. Finished runs are kept, so an interrupted comparison continues. Recipes share their caches.
    """
    if processes()[1] > 1:
        raise UserError("compare: runs one training after the other in one process; start it without a launcher")
    every = list(dict.fromkeys(one for name in names for one in recipe.variants(name)))  # a shell's * names one twice
    if seeds < 1 or len(every) < 2:
        raise UserError(
            f"compare: {len(every)} recipes over {seeds} seeds; give two recipes or a study, and one seed or more"
        )
    planned = _plan(every, seeds, overrides)
    table = _check(planned)
    first = [several[0] for several in planned.values()]
    for settings in {str((one.cache, one.teacher, one.images)): one for one in first}.values():
        if settings.teacher is not None and not finished.is_live(settings.teacher):
            cache.run(settings)
    called = variants.short_names(every)
    for seed in range(seeds):
        for name, several in stop.between(planned.items()):
            log.info("%s, seed %d", called[name], seed)
            out = distill.run(several[seed])
            for protocol in stop.between(several[seed].protocols):
                evaluate.run(protocol, out, TRUSTED)
    _write(table, {called[name]: several for name, several in planned.items()})
    return table


def _plan(names: Sequence[str], seeds: int, overrides: Sequence[str]) -> dict[str, list[Recipe]]:
    """Return each recipe's runs by seed; UserError if two recipes are alike or share a folder."""
    folder = "".join(one.removeprefix("out=") for one in overrides if one.startswith("out="))
    overrides = [*(one for one in overrides if not one.startswith("out=")), "seed=0"]
    loaded = variants.load(names, overrides)
    variants.check_distinct(loaded, overrides)
    outs: dict[str, str] = {}
    for name, settings in loaded.items():
        out = os.path.normpath(Path(folder) / Path(settings.out).name if folder else settings.out)
        if out in outs:
            raise UserError(f"compare: {outs[out]} and {name} write to one folder, {out}; give each its own `out`")
        outs[out] = name
    return {
        name: [dataclasses.replace(loaded[name], seed=seed, out=f"{out}/seed-{seed}") for seed in range(seeds)]
        for out, name in outs.items()
    }


def _check(planned: Mapping[str, Sequence[Recipe]]) -> Path:
    """Check every run before any work begins; return the path of the table to be written."""
    first = {name: several[0] for name, several in planned.items()}
    for name, settings in first.items():
        with variants.named(name):
            check_before(settings)
    outs = [Path(settings.out) for settings in first.values()]
    whole = any(out.is_absolute() for out in outs)
    table = Path(os.path.commonpath([out.absolute() if whole else out for out in outs])) / "comparison.md"
    check_folder(table.parent, "the comparison")
    judged = {name: settings.protocols for name, settings in first.items()}
    baseline = next(iter(judged))
    for name, protocols in judged.items():
        if protocols != judged[baseline] or not protocols:
            raise UserError(
                f"compare: {name} has protocols={protocols} and {baseline} {judged[baseline]}: different protocols, or "
                f"none; what is compared is judged alike, as by 'protocols=[eval/FILE.yaml]'"
            )
    for several in planned.values():
        for settings in several:
            distill.check_claim(settings)
    return table


def _write(table: Path, planned: Mapping[str, Sequence[Recipe]]) -> None:
    runs = {name: rows.read_runs([one.out for one in several]) for name, several in planned.items()}
    protocols = next(iter(planned.values()))[0].protocols
    lines = {Path(one).stem: paired.compare(runs, Path(one).stem) for one in protocols}
    table.parent.mkdir(parents=True, exist_ok=True)
    write_whole(table, "\n\n".join(paired.text(some) for some in lines.values()) + "\n")
    plain = {name: [dataclasses.asdict(line) for line in some] for name, some in lines.items()}
    write_whole(table.with_suffix(".json"), json.dumps(plain, indent=1))
