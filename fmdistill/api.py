"""The Python API: one function for each verb of the command line, which returns values instead of printing them.

Settings are given as on the command line, ["train.steps=100"], or as a mapping, {"train.steps": 100} or
{"train": {"steps": 100}}; the settings of a recipe's first level also as keywords, seed=1. `fmdistill.run` and the
others are these functions. torch is imported when one of them is called.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmdistill import recipe as recipes
from fmdistill.recipe import Recipe
from fmdistill.settings import as_overrides, merge, nested

if TYPE_CHECKING:  # these import torch
    from fmdistill.cache.reader import Cache
    from fmdistill.evaluate.results import Row
    from fmdistill.pipeline.plan import Plan
    from fmdistill.pipeline.start import NewRecipe
    from fmdistill.report.paired import Line

PathLike = str | os.PathLike[str]
Overrides = Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, and the rows of its evaluation by protocol. It is accepted wherever a run is."""

    out: Path
    rows: "dict[str, list[Row]]"

    def __fspath__(self) -> str:
        return str(self.out)

    def __str__(self) -> str:
        from fmdistill import report

        return report.text([str(self.out)])


@dataclass(frozen=True)
class Comparison:
    """A paired comparison: the path of its table in Markdown, and its lines by protocol."""

    table: Path
    lines: "dict[str, list[Line]]"

    def __str__(self) -> str:
        return self.table.read_text()


def run(recipe: PathLike | Recipe, overrides: Overrides = (), **settings: Any) -> RunResult:
    """Run a recipe: cache, distil and evaluate; what is finished is not repeated.

    `recipe` is a recipe's name as on the command line, or a loaded recipe. Raises UserError if a setting is wrong.
    """
    loaded = _load(recipe, overrides, settings)  # before the imports, which take seconds
    from fmdistill import pipeline

    rows = pipeline.run(loaded)
    return RunResult(Path(loaded.out), rows)


def cache(recipe: PathLike | Recipe, overrides: Overrides = (), **settings: Any) -> "Cache":
    """Run the teacher over the images that are not cached yet; return the cache, opened for reading."""
    from fmdistill.cache import finished

    loaded = _load(recipe, overrides, settings)
    if not finished.is_finished(loaded):
        from fmdistill import pipeline
        from fmdistill.cache import stage

        pipeline.check_caching(loaded)
        stage.run(loaded)
    from fmdistill.cache.stage import open_cache

    return open_cache(loaded)


def evaluate(protocol: PathLike, run: PathLike, overrides: Overrides = (), **settings: Any) -> "list[Row]":
    """Evaluate a run or a checkpoint file by a protocol; store the result in the run and return its rows.

    The settings are the protocol's, and `trust=True` if the run names code outside fmdistill. A checkpoint file also
    needs `recipe`, whose images and cache it is evaluated with.
    """
    import fmdistill.evaluate as stage

    return stage.run(os.fspath(protocol), os.fspath(run), _mapping(overrides, settings))


def compare(
    recipes: Sequence[str], seeds: int = 8, overrides: Overrides = (), jobs: int = 1, **settings: Any
) -> Comparison:
    """Run recipes, or all methods of a study, over the same seeds, `jobs` at the same time; return the paired table.

    The first recipe is the baseline. With `out`, all runs and the table are in that folder.
    """
    from fmdistill.pipeline import compare as stage
    from fmdistill.report.paired import Line

    names = [recipes] if isinstance(recipes, str) else list(recipes)
    table = stage.run(names, seeds, as_overrides(_mapping(overrides, settings)), jobs)
    stored = json.loads(table.with_suffix(".json").read_text())
    return Comparison(table, {name: [Line(**line) for line in lines] for name, lines in stored.items()})


def plan(recipe: PathLike | Recipe, overrides: Overrides = (), **settings: Any) -> "Plan":
    """Estimate a recipe's images, bytes and hours from a few images, without touching its cache and its run.

    The plan's own settings are plan.images, plan.steps and plan.gpus; `print` shows the estimate as a text.
    """
    changes = _mapping(overrides, settings)
    own = changes.pop("plan", {})
    loaded = _load(recipe, changes, {})
    from fmdistill.pipeline import plan as stage
    from fmdistill.registry import typed

    return stage.run(loaded, stage.PlanSettings(**typed(stage.PlanSettings, own, "plan")))


def export(run: PathLike, format: str, out: PathLike, trust: bool = False, **settings: Any) -> Path:
    """Write a finished run's student for other software; return the path.

    `format` is one of `fmdistill list exports`, and `settings` are its settings. `trust` allows the run to name code
    outside fmdistill.
    """
    import fmdistill.export as stage

    return stage.run(os.fspath(run), format, os.fspath(out), trust, settings)


def load(path: PathLike, device: str = "auto", trust: bool = False) -> Any:
    """Open a finished run, an exported folder, or a checkpoint of MobileSAM or SAM; return what predicts with it.

    For a SAM that is `fmdistill.predict.sam.MaskPredictor`, segment_anything's `SamPredictor` with `as_sam()`; for a
    CLIP `fmdistill.predict.clip.ClipPredictor`, with `encode_image`, `encode_text` and `classify`. Nothing in a file is
    executed; `trust` allows a run's recipe to name code outside fmdistill. `device` is auto, cpu, cuda or cuda:1.
    Raises UserError if it cannot be opened.
    """
    from fmdistill.predict import opening

    return opening.load(path, device, trust)


def push(folder: PathLike, repo: str, dry_run: bool = False, private: bool = False) -> list[str]:
    """Upload an exported folder to the repository "owner/name" of the Hugging Face hub; return a line for each file.

    With `dry_run` nothing is sent, and neither network nor token is needed. Raises UserError if the folder is no intact
    export, or the upload failed.
    """
    from fmdistill.export import push as stage

    return stage.run(os.fspath(folder), repo, dry_run, private)


def init(path: PathLike, kind: str, overrides: Overrides = (), **settings: Any) -> "NewRecipe":
    """Write a recipe for your own images, sized to them and to this machine.

    Returns the recipe's path with what was counted and the next commands, which `print` shows. `kind` is sam, clip or
    timm. Settings such as images.root and teacher.weights are written into the recipe. Raises UserError, and writes
    nothing, if the file exists already, or the images or the weights do not.
    """
    from fmdistill.pipeline import start

    return start.init(os.fspath(path), kind, _mapping(overrides, settings))


def _mapping(overrides: Overrides, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides and, after them, the keywords as one nested mapping."""
    listed = [overrides] if isinstance(overrides, str) else overrides
    return nested(recipes.parse_overrides(listed), recipes.parse_overrides(settings))


def _load(recipe: PathLike | Recipe, overrides: Overrides, settings: Mapping[str, Any]) -> Recipe:
    changes = _mapping(overrides, settings)
    if isinstance(recipe, Recipe):
        changes.pop("trust", None)  # whoever made the value has decided
        return recipes.freeze(merge(dataclasses.asdict(recipe), changes), "recipe")
    return recipes.load(os.fspath(recipe), changes)
