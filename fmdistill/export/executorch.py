"""Write a student as ExecuTorch programs for XNNPACK, and compare them in ExecuTorch's own runtime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fmdistill.export.phone import Call, PhoneFormat, PhonePart, exported, write
from fmdistill.export.source import FinishedRun
from fmdistill.files import write_whole
from fmdistill.registry import UserError


def run(
    source: FinishedRun,
    out: Path,
    points: int | None = None,
    min_miou: float | None = None,
    min_cosine: float | None = None,
) -> Path:
    """Write ExecuTorch programs in float32: SAM's image encoder, prompt encoder and decoder, or CLIP's two towers.

    `points` are the rows of a prompt of SAM, 2 by default: clicks and a padding row, or a box and clicks. Raises
    UserError if executorch is missing, the run does not fit, or the files differ from the PyTorch student.
    """
    lower, partitioner, runtime = _packages()

    def convert(part: PhonePart, path: Path) -> None:
        write_whole(path, bytes(lower(exported(part), partitioner=[partitioner()]).to_executorch().buffer))

    def opened(path: Path) -> Call:
        program = runtime.get().load_program(str(path))
        method = program.load_method("forward")

        # a method does not keep its program alive
        def call(inputs: Sequence[Tensor], _program: object = program) -> list[Tensor]:
            outputs = method.execute([value.contiguous() for value in inputs])
            return [output.clone() for output in outputs]  # the next call may write into the same memory

        return call

    format = PhoneFormat("executorch", ".pte", False, convert, opened)
    return write(source, out, format, points=points, min_miou=min_miou, min_cosine=min_cosine)


def _packages() -> tuple[Any, Any, Any]:
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # pyright: ignore[reportMissingImports]
        from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]
        from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "export executorch: needs the package executorch; pip install 'fmdistill[executorch]'"
        ) from None
    return to_edge_transform_and_lower, XnnpackPartitioner, Runtime
