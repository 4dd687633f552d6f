"""Run ONNX files by ONNX Runtime, which is an extra of the package."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmdistill.registry import UserError


class Session:
    """An ONNX network, opened on the CPU: names of inputs and outputs, and a call with numpy arrays."""

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        """Open the file; `threads` is the number within an operation, 0 for one a core. UserError if it is damaged."""
        runtime = onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises classes of its own, which its package does not name
            raise UserError(f"{path}: ONNX Runtime cannot open it: {' '.join(str(error).split())[:200]}") from None
        self.inputs: dict[str, tuple[str, Sequence[Any]]] = {
            i.name: (i.type, i.shape) for i in self._session.get_inputs()
        }
        self.outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return each output by its name."""
        return dict(zip(self.outputs, self._session.run(None, dict(feeds)), strict=True))


def weights(path: str | Path) -> int:
    """Return how many numbers the weights of an ONNX file are: its stored tensors but those of shapes and indices.

    A quantised file's scales and zero points are among them. Raises UserError if the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise UserError("the weights of ONNX files are read by onnx; pip install 'fmdistill[onnx]'") from None
    integers = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    return sum(math.prod(tensor.dims) for tensor in tensors if tensor.data_type not in integers)


def onnxruntime() -> Any:
    """Return the module. Raises UserError if it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("ONNX files are run by onnxruntime; pip install 'fmdistill[onnx]'") from None
    return onnxruntime
