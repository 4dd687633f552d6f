"""Distil a teacher that ships with the package, with and without SRW, and show both students."""

import time
from collections.abc import Sequence
from pathlib import Path

import fmdistill.cache as cache
import fmdistill.evaluate as evaluate
from fmdistill import distill, pipeline, recipe, report, stop
from fmdistill.files import check_folder
from fmdistill.logs import log
from fmdistill.pipeline import side_by_side
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, suggest

DEMOS = {
    "sam": ("recipes/demo/sam_mse.yaml", "recipes/demo/sam_srw.yaml"),
    "clip": ("recipes/demo/clip_mse.yaml", "recipes/demo/clip_srw.yaml"),
}
PARTS = 4
NEXT = """
Look at the masks:         fmdistill serve {runs}
Your own images:           fmdistill init mine.yaml {kind} images.root=FOLDER teacher.name={teacher}"""


def run(kind: str = "sam", overrides: Sequence[str] = ()) -> Path:
    """Distil an embedded teacher with and without SRW, evaluate both students, and return the page of the report."""
    if kind not in DEMOS:
        raise UserError(f"demo {kind}: unknown demo.{suggest(kind, DEMOS)}")
    started = time.monotonic()
    recipes = [recipe.load(path, overrides) for path in DEMOS[kind]]
    for settings in recipes:
        pipeline.check_before(settings)
    check_folder(f"report/demo_{kind}", "the report")
    first = recipes[0]

    _tell(1, "the teacher embeds all images once, and its embeddings are stored")
    cache.run(first)
    pipeline.score_teacher(first, first.protocols)
    _tell(2, "two students learn from the stored embeddings, one with plain MSE and one with SRW's weights")
    _train(recipes)
    runs = [settings.out for settings in recipes]
    _tell(3, "both students are compared with the teacher")
    for protocol in stop.between(first.protocols):
        evaluate.run_together(protocol, runs, trust=True)
    _tell(4, "the report is written")
    page = report.run(runs, f"report/demo_{kind}", trust=True)
    print(report.text(runs))
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes. Report: {page}")
    print(NEXT.format(runs=" ".join(runs), kind=kind, teacher=f"{kind}_mini"))
    return page


def _train(recipes: Sequence[Recipe]) -> None:
    waiting = [settings for settings in recipes if not side_by_side.is_trained(settings)]
    if side_by_side.fits(waiting):
        side_by_side.run(waiting, len(waiting))
    for settings in stop.between(recipes):
        distill.run(settings)


def _tell(part: int, what: str) -> None:
    log.info("part %d of %d: %s", part, PARTS, what)
