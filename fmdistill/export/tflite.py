"""Write a student as LiteRT (TensorFlow Lite) files, and compare them in LiteRT's own interpreter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmdistill.export.phone import Call, PhoneFormat, PhonePart, write
from fmdistill.export.source import FinishedRun
from fmdistill.registry import UserError


def run(
    source: FinishedRun,
    out: Path,
    points: int | None = None,
    min_miou: float | None = None,
    min_cosine: float | None = None,
) -> Path:
    """Write LiteRT files in float32: SAM's image encoder, prompt encoder and decoder, or CLIP's two towers.

    `points` are the rows of a prompt of SAM, 2 by default: clicks and a padding row, or a box and clicks. Raises
    UserError if litert-torch is missing, the run does not fit, or the files differ from the PyTorch student.
    """
    converter, interpreter = _packages()

    def convert(part: PhonePart, path: Path) -> None:
        converter.convert(part.network, tuple(part.inputs.values())).export(str(path))

    def opened(path: Path) -> Call:
        runner = interpreter(str(path)).get_signature_runner()

        def call(inputs: Sequence[Tensor]) -> list[Tensor]:
            outputs = runner(**{f"args_{i}": value.contiguous().numpy() for i, value in enumerate(inputs)})
            return [torch.from_numpy(outputs[f"output_{i}"].copy()) for i in range(len(outputs))]

        return call

    format = PhoneFormat("tflite", ".tflite", False, convert, opened)
    return write(source, out, format, points=points, min_miou=min_miou, min_cosine=min_cosine)


def _packages() -> tuple[Any, Any]:
    try:
        import litert_torch  # pyright: ignore[reportMissingImports]
        from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("export tflite: needs the package litert-torch; pip install 'fmdistill[tflite]'") from None
    return litert_torch, Interpreter
