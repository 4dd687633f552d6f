"""Build the students that are trained, and load those of finished runs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import MethodType
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
    "timm_sam": "fmdistill.backbones.timm_sam:timm_sam",
    "timm_clip": "fmdistill.backbones.timm_clip:timm_clip",
    "tinyvit_clip_mini": "fmdistill.mini.tinyvit:tinyvit_clip_mini",
    "tinyvit_clip_shared_mini": "fmdistill.mini.tinyvit:tinyvit_clip_shared_mini",
    "sam_mini": "fmdistill.mini.sam:sam_mini_student",
    "clip_mini": "fmdistill.mini.clip:clip_mini_student",
    **CLASSIFIERS,
}
WHOLE_CLIPS = ("clip_mini",)  # students with both towers of a CLIP, which need no teacher's text tower
WEIGHTS = "student.safetensors"
SHOWN = 2  # levels of modules that an error lists
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def build(settings: Mapping[str, Any]) -> nn.Module:
    """Return the student that a recipe names, in train mode.

    `pretrained` may name a finished run, or a safetensors file of this student's state, whose weights it starts from.
    If the student's own signature has `pretrained`, any value but a finished run is passed to it instead. `freeze` may
    list modules and parameters that are not trained. Raises UserError if the weights are missing or do not fit, or if
    nothing has a name in `freeze`.
    """
    names = frozen_names(settings)
    builder, start = _bind({key: value for key, value in settings.items() if key != "freeze"})
    student = builder()
    freeze(student, names)
    if start is not None:
        where, path = f"student.pretrained={start}", Path(start)
        path = path / WEIGHTS if path.is_dir() else path
        if not path.is_file():
            raise UserError(
                f"{where}: no finished run or file; train that student first with its recipe, or set it to none"
            )
        _load_weights(student, path, where, f"use a run or a safetensors file of the same {settings['name']}")
    return student


def check(settings: Mapping[str, Any]) -> None:
    """Raise a UserError if the student's settings are wrong; nothing is built and no weights are read."""
    frozen_names(settings)
    _bind({key: value for key, value in settings.items() if key != "freeze"})


def check_start(settings: Mapping[str, Any]) -> None:
    """Raise a UserError if `pretrained` names a file or a run that does not exist."""
    start = settings.get("pretrained")
    if not isinstance(start, str) or not (start.endswith(SUFFIXES) or "/" in start):
        return
    path = Path(start)
    if not (path.is_file() or (path / WEIGHTS).is_file()):
        raise UserError(
            f"student.pretrained={start}: no such file or finished run; train it first, download it, or set it to none"
        )


def frozen_names(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names in `freeze`. Raises UserError if it is not a list of texts."""
    return convert(settings.get("freeze", ()), tuple[str, ...], "student.freeze")


def freeze(student: nn.Module, names: Sequence[str]) -> None:
    """Keep the named modules and parameters as they are, the statistics of BatchNorm in them too.

    Raises UserError if a name fits nothing, or if nothing is left to train.
    """
    modules, parameters = dict(student.named_modules()), dict(student.named_parameters())
    for name in names:
        if name in modules and name:
            modules[name].requires_grad_(False).eval()
            modules[name].train = MethodType(_stay, modules[name])  # type: ignore[method-assign]
        elif name in parameters:
            parameters[name].requires_grad = False
        else:
            close = get_close_matches(name, [*modules, *parameters], n=1)
            outer = [other for other in modules if other and other.count(".") < SHOWN]
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise UserError(
                f"student.freeze: nothing is called '{name}'.{hint} Known: {', '.join(outer)}, and their parts"
            )
    if names and not any(parameter.requires_grad for parameter in student.parameters()):
        raise UserError(f"student.freeze={list(names)}: freezes the whole student; leave a part that is trained")


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Take the place of a frozen module's `train`: it stays in eval mode."""
    return module


def load_student(run: str | Path, trust: bool = False) -> nn.Module:
    """Return the student of a finished run, in eval mode on the CPU.

    `trust` allows the run's recipe to name classes of other packages.
    """
    recipe = recipes.load_saved(run, ["trust=true"] if trust else [])
    return _build_with_weights(recipe.student, weights_path(run), "train the run again")


def weights_path(run: str | Path) -> Path:
    """Return the path of the student's weights in a finished run. Raises UserError if the run is not finished."""
    path = Path(run) / WEIGHTS
    if not path.is_file():
        raise UserError(f"{run}: not finished, it has no {WEIGHTS}; `fmdistill distill {run}/recipe.yaml` resumes it")
    return path


def load_checkpoint(settings: Mapping[str, Any], path: Path) -> nn.Module:
    """Return the student that a recipe names with the weights in the file `path`, in eval mode on the CPU."""
    if _takes_own(settings):
        return build({**settings, "pretrained": str(path)}).eval()
    return _build_with_weights(settings, path, f"use a safetensors file of {settings['name']}'s own state")


def build_untrained(settings: Mapping[str, Any]) -> nn.Module:
    """Return the student that a recipe names, in train mode, without its `pretrained` weights."""
    return build({**settings, "pretrained": "none"})


def _bind(settings: Mapping[str, Any]) -> tuple[Callable[[], nn.Module], str | None]:
    """Return the student's bound builder, and the `pretrained` weights to load afterwards if the builder takes none."""
    if "pretrained" not in settings or _takes_own(settings) and not _is_run(settings["pretrained"]):
        return bind(settings, STUDENTS, "student"), None
    rest = {key: value for key, value in settings.items() if key != "pretrained"}
    start = convert(settings["pretrained"], str | None, "student.pretrained")
    return bind(rest, STUDENTS, "student"), None if start in (None, "none") else start


def _build_with_weights(settings: Mapping[str, Any], path: Path, way_out: str) -> nn.Module:
    student = build_untrained(settings)
    _load_weights(student, path, str(path), way_out)
    return student.eval()


def _is_run(start: object) -> bool:
    return isinstance(start, str) and (Path(start) / WEIGHTS).is_file()


def _load_weights(student: nn.Module, path: Path, where: str, way_out: str) -> None:
    state = read_state(path, where, student.state_dict().keys())
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: does not contain this student's weights ({reason}); {way_out}") from None


def _takes_own(settings: Mapping[str, Any]) -> bool:
    name = settings.get("name")
    if not isinstance(name, str):
        return False  # binding raises the error
    return "pretrained" in inspect.signature(resolve(name, STUDENTS, "student.name")).parameters
