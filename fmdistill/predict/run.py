"""Open a finished run for prediction: its student, with the teacher's head, or with its own if it has one."""

from pathlib import Path

import torch

from fmdistill import recipe as recipes
from fmdistill.backbones.iou_correction import corrected
from fmdistill.backbones.promptable import PromptHead
from fmdistill.distill.student import HEAD, detach_head, load_student, weights_path
from fmdistill.predict import clip, sam
from fmdistill.predict.checkpoint_file import own_predictor
from fmdistill.predict.clip import ClipPredictor
from fmdistill.predict.heads import teacher_side
from fmdistill.predict.sam import MaskPredictor
from fmdistill.registry import UserError


def open_run(folder: Path, device: torch.device, trust: bool = False) -> MaskPredictor | ClipPredictor:
    """Return a predictor of the finished run in `folder`; `trust` allows its recipe to name code outside fmdistill.

    The head is the run's own if it trained one, or that of the teacher, from the run's cache, or from the teacher
    itself if the cache is gone; a student that was trained without a teacher uses its own. Predicted IoU is corrected
    if the run stores a correction. Raises UserError if the run is not finished, or has no head.
    """
    recipe = recipes.load_saved(folder, ["trust=true"] if trust else [])
    weights = weights_path(folder)
    if recipe.teacher is None and recipe.cache is None:
        student = load_student(folder, trust)
        if isinstance(own := getattr(student, "head", None), PromptHead):
            corrected(own, folder, weights)
        return own_predictor(student, str(folder), device)
    if (folder / HEAD).is_file():
        student = load_student(folder, trust)
        if (trained := detach_head(student)) is not None:
            return sam.torch_predictor(student, corrected(trained, folder, weights), device)
    head, preprocess = teacher_side(recipe, str(folder))  # before the student is built: it may be refused
    student = load_student(folder, trust)
    if isinstance(head, PromptHead):
        return sam.torch_predictor(student, corrected(head, folder, weights), device)
    width, expected = getattr(student, "out_channels", None), head.config["model_cfg"]["embed_dim"]
    if width not in (None, expected):
        raise UserError(
            f"{folder}: its student gives {width} numbers, but the teacher's texts have {expected}; use a student of "
            f"the teacher's own embedding"
        )
    return clip.torch_predictor(student, head, preprocess, device)
