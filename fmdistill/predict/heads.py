"""Find the head that a student's embeddings are decoded with: its teacher's, from the cache or from the teacher."""

from typing import Any

from fmdistill import teachers
from fmdistill.backbones.clip import ClipPreprocess, TextHead
from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache import manifest
from fmdistill.cache.store import opened
from fmdistill.logs import log
from fmdistill.recipe import CacheSettings, Recipe
from fmdistill.registry import UserError
from fmdistill.teachers import family_of_cache
from fmdistill.teachers.family import Preprocess


def teacher_side(recipe: Recipe, where: str) -> tuple[PromptHead | TextHead, Any]:
    """Return the head and preprocessing of the recipe's teacher, from its cache or, if that is gone, from itself.

    Messages begin with `where`. Raises UserError if the teacher has no head, or if cache and teacher are gone.
    """
    try:
        head, preprocess, family = _from_cache(recipe.cache, recipe)
    except UserError as error:
        head, preprocess, family = _from_teacher(recipe, where, error)
    if isinstance(head, PromptHead) or (isinstance(head, TextHead) and isinstance(preprocess, ClipPreprocess)):
        return head, preprocess
    raise UserError(
        f"{where}: its teacher is of the family '{family}', without a mask decoder or a text tower; load opens "
        f"students of a SAM or a CLIP, and fmdistill.distill.load_student(RUN) returns any other as a network"
    )


def _from_cache(settings: CacheSettings | None, recipe: Recipe) -> tuple[Any, Preprocess, str]:
    if settings is None:
        raise UserError("the recipe has none, since its teacher was live")
    folder = opened(settings).folder  # not by the cache's reader, which needs the images
    stored = manifest.read(folder)
    record = family_of_cache(stored["family"], recipe.teacher)
    head = None if record.head is None else record.head.load(folder)
    return head, record.preprocess.from_json(stored["teacher"]["preprocess"]), record.name


def _from_teacher(recipe: Recipe, where: str, no_cache: UserError) -> tuple[Any, Preprocess, str]:
    log.warning("%s: the head is taken from the teacher, since its cache cannot be read: %s", where, no_cache)
    try:
        teacher = teachers.build(recipe.teacher or {})
    except (UserError, OSError) as error:
        raise UserError(
            f"{where}: its teacher's head can be read neither from its cache ({no_cache}) nor from the teacher "
            f"({error}); restore one of them, or load an export of the run"
        ) from None
    return teacher.head(), teacher.preprocess, teacher.family
