"""Open a finished run for prediction: its student, with the teacher's head, or with its own if it has one."""

from pathlib import Path
from typing import Any

import torch

from fmdistill import recipe as recipes
from fmdistill import teachers
from fmdistill.backbones.clip import ClipPreprocess, TextHead
from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache import manifest
from fmdistill.cache.store import opened
from fmdistill.distill.student import load_student, weights_path
from fmdistill.logs import log
from fmdistill.predict import clip, sam
from fmdistill.predict.checkpoint_file import own_predictor
from fmdistill.predict.clip import ClipPredictor
from fmdistill.predict.sam import MaskPredictor
from fmdistill.recipe import CacheSettings, Recipe
from fmdistill.registry import UserError
from fmdistill.teachers import family_of_cache
from fmdistill.teachers.family import Preprocess


def open_run(folder: Path, device: torch.device, trust: bool = False) -> MaskPredictor | ClipPredictor:
    """Return a predictor of the finished run in `folder`; `trust` allows its recipe to name code outside fmdistill.

    The head is that of the teacher, from the run's cache, or from the teacher itself if the cache is gone; a student
    that was trained without a teacher uses its own. Raises UserError if the run is not finished, or has no head.
    """
    recipe = recipes.load_saved(folder, ["trust=true"] if trust else [])
    weights_path(folder)
    if recipe.teacher is None and recipe.cache is None:
        return own_predictor(load_student(folder, trust), str(folder), device)
    head, preprocess = _teacher_side(recipe, folder)  # before the student is built: it may be refused
    student = load_student(folder, trust)
    if isinstance(head, PromptHead):
        return sam.torch_predictor(student, head, device)
    width, expected = getattr(student, "out_channels", None), head.config["model_cfg"]["embed_dim"]
    if width not in (None, expected):
        raise UserError(
            f"{folder}: its student gives {width} numbers, but the teacher's texts have {expected}; use a student of "
            f"the teacher's own embedding"
        )
    return clip.torch_predictor(student, head, preprocess, device)


def _teacher_side(recipe: Recipe, folder: Path) -> tuple[PromptHead | TextHead, Any]:
    """Return the teacher's head and preprocessing. Raises UserError if it has no head, or if both are gone."""
    try:
        head, preprocess, family = _from_cache(recipe.cache, recipe)
    except UserError as error:
        head, preprocess, family = _from_teacher(recipe, folder, error)
    if isinstance(head, PromptHead) or (isinstance(head, TextHead) and isinstance(preprocess, ClipPreprocess)):
        return head, preprocess
    raise UserError(
        f"{folder}: its teacher is of the family '{family}', without a mask decoder or a text tower; load opens "
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


def _from_teacher(recipe: Recipe, folder: Path, no_cache: UserError) -> tuple[Any, Preprocess, str]:
    log.warning("%s: the head is taken from the teacher, since its cache cannot be read: %s", folder, no_cache)
    try:
        teacher = teachers.build(recipe.teacher or {})
    except (UserError, OSError) as error:
        raise UserError(
            f"{folder}: its teacher's head can be read neither from its cache ({no_cache}) nor from the teacher "
            f"({error}); restore one of them, or load an export of the run"
        ) from None
    return teacher.head(), teacher.preprocess, teacher.family
