"""Students: the networks that are trained, and how a finished one is opened."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fmdistill import recipe as recipes
from fmdistill.backbones.checkpoints import read_state
from fmdistill.backbones.classifiers import CLASSIFIERS
from fmdistill.backbones.tinyvit import tinyvit_sam
from fmdistill.backbones.tinyvit_clip import tinyvit_clip
from fmdistill.registry import UserError, bind, convert, resolve

STUDENTS: dict[str, Callable[..., nn.Module] | str] = {
    "tinyvit_sam": tinyvit_sam,
    "tinyvit_sam_mini": "fmdistill.mini.tinyvit:tinyvit_sam_mini",
    "tinyvit_clip": tinyvit_clip,
    "tinyvit_clip_mini": "fmdistill.mini.tinyvit:tinyvit_clip_mini",
    "sam_mini": "fmdistill.mini.sam:sam_mini_student",
    "clip_mini": "fmdistill.mini.clip:clip_mini_student",
    **CLASSIFIERS,
}
WHOLE_CLIPS = ("clip_mini",)  # students with both towers of a CLIP, which need no teacher's text tower
WEIGHTS = "student.safetensors"


def build(settings: Mapping[str, Any]) -> nn.Module:
    """Return the student that a recipe names, in train mode.

    Any student may start from the weights of another's run, or of a safetensors file of its own state, which
    `pretrained` names; where its own signature has a `pretrained`, that is the student's.
    """
    student, start = _bind(settings)
    made = student()
    if start is not None:
        where, path = f"student.pretrained={start}", Path(start)
        path = path / WEIGHTS if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"{where}: no finished run or file; train that student first with its recipe, or give none")
        _fill(made, path, where, f"give a run or a safetensors file of the same {settings['name']}")
    return made


def check(settings: Mapping[str, Any]) -> None:
    """Bind the student that a recipe names, without making it or looking for weights."""
    _bind(settings)


def load_student(run: str | Path, trust: bool = False) -> nn.Module:
    """Return the student of a finished run, in eval mode on the CPU."""
    recipe = recipes.load_saved(run, ["trust=true"] if trust else [])
    return _filled(recipe.student, weights_of(run), "train the run anew")


def weights_of(run: str | Path) -> Path:
    """Return the file that holds the weights of a finished run's student."""
    path = Path(run) / WEIGHTS
    if not path.is_file():
        raise UserError(f"{run}: not finished, it has no {WEIGHTS}; `fmdistill distill {run}/recipe.yaml` resumes it")
    return path


def load_checkpoint(settings: Mapping[str, Any], path: Path) -> nn.Module:
    """Return the student that a recipe names with the weights in the file `path`, in eval mode on the CPU."""
    if _takes_own(settings):
        return build({**settings, "pretrained": str(path)}).eval()
    return _filled(settings, path, f"give a safetensors file of {settings['name']}'s own state")


def build_untrained(settings: Mapping[str, Any]) -> nn.Module:
    """Return the student that a recipe names as it starts without any weights from elsewhere, in train mode."""
    return build({**settings, "pretrained": "none"})


def _bind(settings: Mapping[str, Any]) -> tuple[Callable[[], nn.Module], str | None]:
    """Return the bound student, and what it starts from where that is not for its own signature."""
    if "pretrained" not in settings or _takes_own(settings):
        return bind(settings, STUDENTS, "student"), None
    rest = {key: value for key, value in settings.items() if key != "pretrained"}
    start = convert(settings["pretrained"], str | None, "student.pretrained")
    return bind(rest, STUDENTS, "student"), None if start in (None, "none") else start


def _filled(settings: Mapping[str, Any], path: Path, way_out: str) -> nn.Module:
    student = build_untrained(settings)
    _fill(student, path, str(path), way_out)
    return student.eval()


def _fill(student: nn.Module, path: Path, where: str, way_out: str) -> None:
    state = read_state(path, where, student.state_dict().keys())
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: does not hold this student ({reason}); {way_out}") from None


def _takes_own(settings: Mapping[str, Any]) -> bool:
    name = settings.get("name")
    if not isinstance(name, str):
        return False  # binding says so
    return "pretrained" in inspect.signature(resolve(name, STUDENTS, "student.name")).parameters
