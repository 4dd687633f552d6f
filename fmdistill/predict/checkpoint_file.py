"""Open a checkpoint file by the names of its tensors: MobileSAM's, Meta's SAMs, and those of sam_mini and clip_mini."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from fmdistill.backbones.checkpoints import read_state
from fmdistill.backbones.clip import TextHead, WholeClip
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import SHA256, kind_of_state, read_checkpoint, sam_of_state
from fmdistill.distill import student as students
from fmdistill.predict import clip, mobilesam, sam
from fmdistill.predict.clip import ClipPredictor
from fmdistill.predict.sam import MaskPredictor, WholeSam
from fmdistill.registry import UserError

WHOLE = {"head.prompt_encoder.": "sam_mini", "clip.": "clip_mini"}  # students that need no teacher, by their names
PARTS = {  # names in files that hold no whole SAM or CLIP, what they are, and the way out
    "trunk.": ("a student without its teacher's head", "load the run that trained it, or an export"),
    "prompt_head.": (
        "a student with its own mask decoder, without the recipe that says what it is",
        "load the run that trained it, or an export",
    ),
    "layers.": ("a TinyViT without a mask decoder", "start a student from it by student.pretrained=FILE"),
    "stages.": ("a TinyViT without a mask decoder", "start a student from it by student.pretrained=FILE"),
    "visual.": (
        "the weights of an open_clip model, without its sizes and its preprocessing",
        "load its folder, which has an open_clip_config.json",
    ),
    "image_encoder.": ("a SAM of unknown size", "load MobileSAM's file or one of Meta's (ViT-B, ViT-L, ViT-H)"),
}


def open_file(path: Path, device: torch.device) -> MaskPredictor | ClipPredictor:
    """Return the predictor of a checkpoint file of plain tensors; nothing in it is executed.

    Raises UserError if it is damaged, no checkpoint, or not one of a whole SAM or CLIP.
    """
    if path.suffix == ".onnx":
        raise UserError(
            f"{path}: an ONNX file alone does not say how to use it; load the folder that `fmdistill export` wrote, "
            f"with its fmdistill.json"
        )
    where, state = str(path), _read(path)
    sam = _published_sam(state, where)
    if sam is not None:
        return MaskPredictor(sam.to(device))
    whole = _own_kind(state)
    if whole is not None:
        return own_predictor(students.load_checkpoint({"name": whole}, path), where, device)
    starts = [start for start in PARTS if any(name.startswith(start) for name in state)]
    if starts:
        what, way_out = PARTS[starts[-1]]
        raise UserError(f"{where}: contains {what}; {way_out}")
    first = next(iter(state))
    raise UserError(
        f"{where}: neither a SAM nor a CLIP, its first tensor is '{first}'; load opens a run, an exported folder, or a "
        f"checkpoint of MobileSAM or SAM"
    )


def whole_sam(path: Path) -> WholeSam | None:
    """Return the network of a checkpoint file that has a mask decoder of its own; None if it has none."""
    state = _read(path)
    sam = _published_sam(state, str(path))
    if sam is not None:
        return WholeSam(sam.image_encoder, PromptHead.from_sam(sam)).eval()
    if _own_kind(state) == "sam_mini":
        student: Any = students.load_checkpoint({"name": "sam_mini"}, path)
        return WholeSam(student.encoder, student.head).eval()
    return None


def _read(path: Path) -> dict[str, Tensor]:
    # only the checksums of Meta's files are known, and computing one takes seconds
    return read_checkpoint(path, str(path)) if path.name in SHA256 else read_state(path, str(path))


def _published_sam(state: Mapping[str, Tensor], where: str) -> Sam | None:
    """Return the network of a MobileSAM's or of Meta's checkpoint; None for any other."""
    if mobilesam.MARK in state:
        return mobilesam.sam_of_state(state, where)
    kind = kind_of_state(state)
    return None if kind is None else sam_of_state(kind, state, where).requires_grad_(False)


def _own_kind(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the student that needs no teacher and has these tensors; None if it is none."""
    return next((name for start, name in WHOLE.items() if any(key.startswith(start) for key in state)), None)


def own_predictor(student: torch.nn.Module, where: str, device: torch.device) -> MaskPredictor | ClipPredictor:
    """Return the predictor of a student that is a whole SAM or CLIP. Raises UserError if it is neither."""
    head = getattr(student, "head", None)
    if isinstance(head, PromptHead):
        return sam.torch_predictor(student, head, device)
    if isinstance(student, WholeClip):
        head = TextHead.from_clip(student.whole(), student.config)
        return clip.torch_predictor(student, head, student.preprocess, device)
    raise UserError(
        f"{where}: its student is a {type(student).__name__}, without a mask decoder or a text tower; load opens "
        f"students of a SAM or a CLIP, and fmdistill.distill.load_student(RUN) returns any other as a network"
    )
