"""The text side of an evaluation by words: a text tower, the images to compare with its texts, and their checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fmdistill import teachers
from fmdistill.backbones.clip import TextHead, WholeClip
from fmdistill.cache import Cache, open_cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill.student import STUDENTS, WHOLE_CLIPS
from fmdistill.evaluate.annotated import Annotated
from fmdistill.images import build as build_images
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError


@dataclass(frozen=True)
class TextSide:
    """A text tower, the images to compare with its texts, and the folder that stores text classifiers, if any."""

    head: TextHead
    data: Annotated
    folder: Path | None


def check(evaluator: str, recipe: Recipe) -> None:
    """Raise a UserError that names the `evaluator` if neither teacher nor student of the recipe has a text tower."""
    name = recipe.student.get("name")
    if recipe.cache is None and name in STUDENTS and name not in WHOLE_CLIPS:
        raise UserError(
            f"student.name={name}: has no text tower, and its recipe no cache with a teacher's; "
            f"{evaluator} needs a run distilled from CLIP"
        )
    if recipe.cache is not None and not teachers.may_belong_to(recipe.teacher, "clip"):
        raise UserError(
            f"teacher.name={(recipe.teacher or {}).get('name')}: has no text tower; {evaluator} needs a run "
            f"distilled from CLIP"
        )


def of_run(
    recipe: Recipe, models: Mapping[str, nn.Module], images: Mapping[str, Any] | None, protocol: str
) -> TextSide:
    """Return the text side to evaluate a run with: that of its cache, or the student's own if it is a whole CLIP.

    `images` are a source's settings; None means the recipe's validation images, with the teacher's embeddings if they
    are cached. Raises UserError if neither has a text tower.
    """
    if recipe.cache is not None:
        return of_cache(open_cache(recipe), images, protocol)
    student = next(iter(models.values())) if len(models) == 1 else None
    if not isinstance(student, WholeClip):
        raise UserError(
            f"student.name={recipe.student['name']}: has no text tower, and its recipe no cache with a teacher's; "
            f"{protocol} needs a run distilled from CLIP"
        )
    data = Annotated(build_images(recipe.images if images is None else images), student.preprocess)
    return TextSide(TextHead.from_clip(student.whole(), student.config), data, None)


def of_cache(cache: Cache, images: Mapping[str, Any] | None, protocol: str, pixels: bool = True) -> TextSide:
    """Return the text side of a cache. Raises UserError if its teacher has no text tower."""
    head = cache.head() if cache.family == "clip" else None
    if not isinstance(head, TextHead):
        raise UserError(
            f"{cache.root}: its teacher is of the family '{cache.family}' and has no text tower; "
            f"{protocol} needs a run distilled from CLIP"
        )
    cached = CachedImages(cache, "validation") if images is None else None
    source = cache.images if images is None else build_images(images)
    return TextSide(head, Annotated(source, cache.preprocess, cached, pixels), cache.root / "classifiers")


def check_reading(batch: int, workers: int, limit: int | None) -> None:
    """Raise a UserError if `batch`, `workers` or `limit` is out of range."""
    if batch < 1:
        raise UserError(f"batch={batch}: needs at least 1")
    if workers < 0:
        raise UserError(f"workers={workers}: expected 0 (load in this process) or more")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: needs at least 1, or null for all")
