"""Write a student as one safetensors file that timm loads by itself."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save as to_bytes
from torch import nn

from fmdistill.backbones.clip import ClipPreprocess
from fmdistill.backbones.tinyvit_clip import TinyViTCLIP
from fmdistill.export.source import FinishedRun
from fmdistill.files import write_whole
from fmdistill.registry import UserError
from fmdistill.teachers.timm import TimmPreprocess


def run(source: FinishedRun, out: Path) -> Path:
    """Write the student with its preprocessing, which its cache's manifest states."""
    preprocess = source.preprocess
    if not isinstance(preprocess, TimmPreprocess | ClipPreprocess):
        raise UserError(
            f"export timm: {source.recipe.out} was distilled from the family '{source.family}', and timm has no "
            f"transform for its images; export a run that was distilled from a teacher of timm or open_clip"
        )
    return export(source.student, preprocess, out)


def export(student: nn.Module, preprocess: TimmPreprocess | ClipPreprocess, out: Path) -> Path:
    """Write the student's float32 weights in timm's names to `out` and return it.

    The projection is the model's classifier, with a bias of zero: timm's `create_model(NAME, num_classes=D)` loads the
    file strictly and returns the embedding (B, D). The file's metadata holds timm's config under "timm".
    """
    if not isinstance(student, TinyViTCLIP):
        raise UserError(
            f"export timm: the student is a {type(student).__name__}, which is no model of timm's; train a "
            f"`tinyvit_clip`, or write the student alone with the format half"
        )
    projection: Any = student.head.proj
    state = {**student.trunk.state_dict(), "head.fc.weight": projection.weight}
    state["head.fc.bias"] = torch.zeros(student.out_channels)
    plain = {name: _plain(value) for name, value in state.items()}
    described = config(student, preprocess)
    model = timm.create_model(
        described["architecture"], num_classes=described["num_classes"], **described["model_args"]
    )
    model.load_state_dict(plain)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, to_bytes(plain, {"format": "pt", "timm": json.dumps(described)}))
    return out


def config(student: TinyViTCLIP, preprocess: TimmPreprocess | ClipPreprocess) -> dict[str, Any]:
    """Return the content of timm's config.json: architecture, its arguments, and the preprocessing."""
    crop: dict[str, Any] = {"crop_pct": 1.0}
    if isinstance(preprocess, TimmPreprocess):
        crop = {"crop_pct": preprocess.crop_pct, "crop_mode": preprocess.crop_mode}
    elif preprocess.resize_mode == "squash":
        crop["crop_mode"] = "squash"
    return {
        "architecture": student.variant,
        "num_classes": student.out_channels,
        "model_args": student.trunk_settings,
        "pretrained_cfg": {
            "input_size": [3, preprocess.image_size, preprocess.image_size],
            "interpolation": preprocess.interpolation,
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            **crop,
            "num_classes": student.out_channels,
            "classifier": "head.fc",
        },
    }


def _plain(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().cpu().clone().contiguous()
    return value.float() if value.is_floating_point() else value
