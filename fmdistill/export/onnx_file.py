"""Write a network as one ONNX file."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fmdistill.registry import UserError

OPSET = 18  # what onnxruntime-web 1.14 and all tools of docs/exports.md read


def write(
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    opset: int = OPSET,
) -> None:
    """Export `network` in eval mode, called with `inputs` in their order, to `path`, weights included.

    `dynamic` names the axes whose size may differ from the example's, of inputs and outputs. torch's exporter by
    tracing is used: on TinyViT its file is the faster one, and it takes 3 s instead of 50. Raises UserError if the
    package onnx is not installed.
    """
    try:
        import onnx  # noqa: F401  # the exporter needs it
    except ImportError:
        raise UserError("ONNX files are written by the package onnx; pip install 'fmdistill[onnx]'") from None
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused operator that ONNX lacks
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of branches on shapes, which are constant
            torch.onnx.export(
                network.eval(),
                tuple(inputs.values()),
                str(path),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={name: dict(axes) for name, axes in (dynamic or {}).items()},
                opset_version=opset,
                dynamo=False,
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def add_properties(path: Path, properties: Mapping[str, str]) -> None:
    """Add named texts to the metadata of an ONNX file."""
    import onnx

    model = onnx.load(str(path))
    for name, value in properties.items():
        model.metadata_props.add(key=name, value=value)
    onnx.save(model, str(path))
