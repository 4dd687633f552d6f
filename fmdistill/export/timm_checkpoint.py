"""Write a student as one safetensors file that timm loads by itself."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save as to_bytes
from torch import nn

from fmdistill.backbones.clip import ClipPreprocess
from fmdistill.backbones.timm_clip import TimmCLIP
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
    if not isinstance(student, TimmCLIP):
        raise UserError(
            f"export timm: the student is a {type(student).__name__}, which is no model of timm's; train a "
            f"`tinyvit_clip`, or write the student alone with the format half"
        )
    projection: Any = student.head.proj
    described = config(student, preprocess)
    classifier = described["pretrained_cfg"]["classifier"]
    state = {**student.trunk.state_dict(), f"{classifier}.weight": projection.weight}
    state[f"{classifier}.bias"] = torch.zeros(student.out_channels)
    plain = {name: _plain(value) for name, value in state.items()}
    _check_model(student, described, plain)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, to_bytes(plain, {"format": "pt", "timm": json.dumps(described)}))
    return out


def config(student: TimmCLIP, preprocess: TimmPreprocess | ClipPreprocess) -> dict[str, Any]:
    """Return the content of timm's config.json: architecture, its arguments, and the preprocessing."""
    crop: dict[str, Any] = {"crop_pct": 1.0}
    registered: Any = timm.get_pretrained_cfg(student.variant)
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
            "classifier": registered.classifier,
        },
    }


@torch.no_grad()
def _check_model(student: TimmCLIP, described: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    """Raise a UserError unless timm's own model, with its pooling and classifier, gives the student's embedding."""
    image_13SS = torch.randn(1, 3, student.image_size, student.image_size, generator=torch.Generator().manual_seed(0))
    device = next(student.parameters()).device
    model: nn.Module = timm.create_model(
        described["architecture"], num_classes=described["num_classes"], **described["model_args"]
    )
    model, image_13SS = model.to(device).eval(), image_13SS.to(device)
    training, reason = student.training, "it pools its features in another way"
    try:
        model.load_state_dict(state)
        expected = student.eval()(image_13SS)["embedding"]
        equal = torch.allclose(model(image_13SS), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    except RuntimeError as error:
        equal, reason = False, " ".join(str(error).split())[:120]
    student.train(training)
    if not equal:
        raise UserError(
            f"export timm: timm's {student.variant} with one classifier does not give the student's embedding "
            f"({reason}); export it as openclip or onnx, or write the student alone with the format half"
        )


def _plain(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().cpu().clone().contiguous()
    return value.float() if value.is_floating_point() else value
