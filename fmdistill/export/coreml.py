"""Write a student as CoreML packages; only Apple's systems run them, so nothing is compared."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fmdistill.export.phone import PhoneFormat, PhonePart, exported, write
from fmdistill.export.source import FinishedRun
from fmdistill.registry import UserError

REASON = "CoreML runs on Apple's systems only"


def run(source: FinishedRun, out: Path, precision: Literal["fp32", "fp16"] = "fp32", points: int | None = None) -> Path:
    """Write CoreML packages for iOS 16 and macOS 13: SAM's image encoder, prompt encoder and decoder, or CLIP's towers.

    `points` are the rows of a prompt of SAM, 2 by default: clicks and a padding row, or a box and clicks. Raises
    UserError if coremltools is missing or the run does not fit. The files are not run.
    """
    tools = coremltools()

    def convert(part: PhonePart, path: Path) -> None:
        converted(tools, part, precision).save(str(path))

    return write(source, out, PhoneFormat("coreml", ".mlpackage", True, convert, reason=REASON), precision, points)


def coremltools() -> Any:
    """Return the module coremltools. Raises UserError if it is not installed."""
    try:
        import coremltools  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("export coreml: needs the package coremltools; pip install 'fmdistill[coreml]'") from None
    return coremltools


def converted(tools: Any, part: PhonePart, precision: str) -> Any:
    """Return the part as a model of coremltools, `tools`."""
    # by torch.export, since coremltools 9.0 fails on a traced TinyViT with NumPy 2.4
    program = exported(part).run_decompositions({})
    return tools.convert(
        program,
        inputs=[_input(tools, name, value) for name, value in part.inputs.items()],
        outputs=[tools.TensorType(name=name) for name in part.outputs],
        convert_to="mlprogram",
        minimum_deployment_target=tools.target.iOS16,
        compute_precision=tools.precision.FLOAT16 if precision == "fp16" else tools.precision.FLOAT32,
    )


def _input(tools: Any, name: str, value: torch.Tensor) -> Any:
    if name == "image":
        return tools.ImageType(name=name, shape=tuple(value.shape), color_layout=tools.colorlayout.RGB)
    dtype = np.float32 if value.is_floating_point() else np.int32
    return tools.TensorType(name=name, shape=tuple(value.shape), dtype=dtype)
