"""Students: the networks that are trained, and how a finished one is opened."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fmdistill import recipe as recipes
from fmdistill.backbones.classifiers import CLASSIFIERS
from fmdistill.backbones.clip_mini import clip_mini_student
from fmdistill.backbones.mini import sam_mini_student
from fmdistill.backbones.tinyvit import tinyvit_sam, tinyvit_sam_mini
from fmdistill.backbones.tinyvit_clip import tinyvit_clip, tinyvit_clip_mini
from fmdistill.registry import UserError, bind, resolve

STUDENTS = {
    "tinyvit_sam": tinyvit_sam,
    "tinyvit_sam_mini": tinyvit_sam_mini,
    "tinyvit_clip": tinyvit_clip,
    "tinyvit_clip_mini": tinyvit_clip_mini,
    "sam_mini": sam_mini_student,
    "clip_mini": clip_mini_student,
    **CLASSIFIERS,
}
WEIGHTS = "student.safetensors"


def build(settings: Mapping[str, Any]) -> nn.Module:
    """Return the student that a recipe names, in train mode."""
    return bind(settings, STUDENTS, "student")()


def load_student(run: str | Path, trust: bool = False) -> nn.Module:
    """Return the student of a finished run, in eval mode on the CPU."""
    recipe = recipes.load_saved(run, ["trust=true"] if trust else [])
    path = Path(run) / WEIGHTS
    if not path.is_file():
        raise UserError(f"{run}: not finished, it has no {WEIGHTS}; `fmdistill distill {run}/recipe.yaml` resumes it")
    return _filled(recipe.student, path, "train the run anew")


def load_checkpoint(settings: Mapping[str, Any], path: Path) -> nn.Module:
    """Return the student that a recipe names with the weights in the file `path`, in eval mode on the CPU."""
    if _takes_pretrained(settings):
        return build({**settings, "pretrained": str(path)}).eval()
    return _filled(settings, path, f"give a safetensors file of {settings['name']}'s own state")


def build_untrained(settings: Mapping[str, Any]) -> nn.Module:
    """Return the student that a recipe names as it starts without any weights from elsewhere, in train mode."""
    return build({**settings, "pretrained": "none"} if _takes_pretrained(settings) else settings)


def _filled(settings: Mapping[str, Any], path: Path, way_out: str) -> nn.Module:
    student = build_untrained(settings)
    try:
        student.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: does not hold this student ({str(error).splitlines()[0]}); {way_out}") from None
    return student.eval()


def _takes_pretrained(settings: Mapping[str, Any]) -> bool:
    return "pretrained" in inspect.signature(resolve(str(settings["name"]), STUDENTS, "student.name")).parameters
