"""Build the students that are trained, and load those of finished runs."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import MethodType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from fmdistill import recipe as recipes
from fmdistill.backbones.checkpoints import read_state
from fmdistill.backbones.classifiers import CLASSIFIERS
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.tinyvit import tinyvit_sam
from fmdistill.backbones.tinyvit_clip import tinyvit_clip
from fmdistill.distill import checkpoint
from fmdistill.files import write_whole
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
HEAD = "prompt_head.json"  # beside the weights of a run that trained a mask decoder: its sizes
PROMPT_HEAD = "prompt_head"  # the name of such a decoder in its student
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
    if start is not None:
        where, path = f"student.pretrained={start}", Path(start)
        path = path / WEIGHTS if path.is_dir() else path
        if not path.is_file():
            raise UserError(
                f"{where}: no finished run or file; train that student first with its recipe, or set it to none"
            )
        _load_weights(student, path, where, f"use a run or a safetensors file of the same {settings['name']}")
    freeze(student, names)
    return student


def own_head(student: nn.Module) -> PromptHead | None:
    """Return the mask decoder that was trained with the student, None if it uses its teacher's."""
    head = getattr(student, PROMPT_HEAD, None)
    return head if isinstance(head, PromptHead) else None


def detach_head(student: nn.Module) -> PromptHead | None:
    """Remove the mask decoder that was trained with the student from it, and return it; None if it has none."""
    head = own_head(student)
    if head is not None:
        delattr(student, PROMPT_HEAD)
    return head


def save(student: nn.Module, folder: Path) -> None:
    """Write the student's weights into a run's folder, which finishes it, after the sizes of its own mask decoder."""
    if (head := own_head(student)) is not None:
        save_sizes(head, folder)
    checkpoint.save_state(student.state_dict(), folder / WEIGHTS)


def save_sizes(head: PromptHead, folder: Path) -> None:
    """Write the sizes of a student's own mask decoder into `folder`, beside the weights that contain it."""
    write_whole(folder / HEAD, json.dumps(head.config, indent=1) + "\n")


def check(settings: Mapping[str, Any]) -> None:
    """Raise a UserError if the student's settings are wrong; nothing is built and no weights are read."""
    frozen_names(settings)
    _bind({key: value for key, value in settings.items() if key != "freeze"})


def check_start(settings: Mapping[str, Any]) -> None:
    """Raise a UserError if `pretrained` names a file or a run that does not exist, or lacks its decoder's sizes."""
    start = settings.get("pretrained")
    if not isinstance(start, str) or not (start.endswith(SUFFIXES) or "/" in start):
        return
    path = Path(start)
    weights = path if path.is_file() else path / WEIGHTS
    if not weights.is_file():
        raise UserError(
            f"student.pretrained={start}: no such file or finished run; train it first, download it, or set it to none"
        )
    if _holds_head(weights):
        _head_beside(weights, f"student.pretrained={start}")


def frozen_names(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names in `freeze`. Raises UserError if it is not a list of texts, or names parts of a mask decoder."""
    names = convert(settings.get("freeze", ()), tuple[str, ...], "student.freeze")
    for name in names:
        if name.partition(".")[0] == PROMPT_HEAD:
            raise UserError(
                f"student.freeze: '{name}' is of the student's own mask decoder, which task.head=frozen keeps as it is "
                f"and task.head=trained trains; remove it here, and choose by task.head of task refine"
            )
    return names


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
    if "pretrained" not in settings or _takes_own(settings) and not _is_own_state(settings["pretrained"]):
        return bind(settings, STUDENTS, "student"), None
    rest = {key: value for key, value in settings.items() if key != "pretrained"}
    start = convert(settings["pretrained"], str | None, "student.pretrained")
    return bind(rest, STUDENTS, "student"), None if start in (None, "none") else start


def _build_with_weights(settings: Mapping[str, Any], path: Path, way_out: str) -> nn.Module:
    student = build_untrained(settings)
    _load_weights(student, path, str(path), way_out)
    return student.eval()


def _is_own_state(start: object) -> bool:
    """Return whether `pretrained` names a finished run, or a file with a mask decoder that was trained with a student.

    The builders of students that load weights themselves know neither.
    """
    return isinstance(start, str) and ((Path(start) / WEIGHTS).is_file() or _holds_head(Path(start)))


def _holds_head(path: Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return any(f"{PROMPT_HEAD}." in name for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False  # whoever reads all of it says why


def _load_weights(student: nn.Module, path: Path, where: str, way_out: str) -> None:
    names = student.state_dict().keys()
    state = read_state(path, where, names)
    if any(name.startswith(f"{PROMPT_HEAD}.") for name in state.keys() - names):
        setattr(student, PROMPT_HEAD, _head_beside(path, where))
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: does not contain this student's weights ({reason}); {way_out}") from None


def _head_beside(path: Path, where: str) -> PromptHead:
    """Return a mask decoder of the sizes that are stored beside the weights `path`, frozen, with initial weights."""
    sizes = path.with_name(HEAD)
    if not sizes.is_file():
        raise UserError(
            f"{where}: contains the mask decoder that was trained with the student, but {sizes}, which states the "
            f"decoder's sizes, is missing; copy it from the same run"
        )
    try:
        head = PromptHead.from_config(json.loads(sizes.read_text()))
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{sizes}: not the sizes of a mask decoder ({error}); copy it from the run again") from None
    return head.requires_grad_(False)  # only task refine trains it


def _takes_own(settings: Mapping[str, Any]) -> bool:
    name = settings.get("name")
    if not isinstance(name, str):
        return False  # binding raises the error
    return "pretrained" in inspect.signature(resolve(name, STUDENTS, "student.name")).parameters
