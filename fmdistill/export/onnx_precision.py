"""Convert an ONNX file from float32 to float16 or int8; layers that overflow or lose most stay in float32."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fmdistill.predict.onnx_session import Session

Precision = Literal["fp32", "fp16", "int8"]
Feeds = Sequence[Mapping[str, np.ndarray]]
LARGEST = 65504 / 4  # of float16, with room for images that were not measured
SHARES = (0.0, 0.05, 0.1, 0.2, 0.4)  # of the quantised layers that stay in float32, tried in this order
SMALL = 256  # numbers of a tensor that is not worth storing in float16
LAYERS = ("Conv", "MatMul", "Gemm")


def to_half(path: Path, feeds: Feeds, parts: Sequence[str] = ("",)) -> list[str]:
    """Convert the file to float16 with float32 inputs and outputs; return the nodes kept in float32 for overflow.

    A node is kept if on `feeds` one of its values exceeds LARGEST. Only nodes whose names contain one of `parts` are
    converted at all.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(str(path))
    largest = {name: value for name, (value, _) in magnitudes(path, feeds).items()}
    named = [node for node in model.graph.node if any(part in node.name for part in parts)]
    overflow = [n.name for n in named if any(largest.get(name, 0.0) > LARGEST for name in (*n.input, *n.output))]
    outside = {node.name for node in model.graph.node} - {node.name for node in named}
    half = convert_float_to_float16(model, keep_io_types=True, node_block_list=sorted({*overflow, *outside}))
    onnx.save(half, str(path))
    return overflow


def store_half(path: Path) -> None:
    """Store the weights in float16, each with a conversion to float32 after it; the network computes in float32.

    ONNX Runtime 1.32 crashes on the CPU while it opens a text tower of CLIP that computes in float16.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(path))
    graph, casts = model.graph, []
    for tensor in list(graph.initializer):
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < SMALL or np.abs(values).max() > LARGEST:
            continue
        half = numpy_helper.from_array(values.astype(np.float16), f"{tensor.name}/half")
        graph.initializer.remove(tensor)
        graph.initializer.append(half)
        casts.append(helper.make_node("Cast", [half.name], [tensor.name], f"{tensor.name}/Cast", to=TensorProto.FLOAT))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    onnx.save(model, str(path))


def to_int8(
    path: Path,
    feeds: Feeds,
    error: Callable[[Path], float],
    limit: float,
) -> dict[str, Any]:
    """Quantise convolutions and linear layers to int8, statically; return what was kept in float32 and the errors.

    Weights have a scale for each channel, activations one for each tensor, from their range on `feeds`. Layers are
    ordered by the noise that 8 bits add to their input, and more and more of the noisiest stay in float32, until
    `error` of the quantised file is at most `limit`; the best of all attempts is kept.
    """
    import onnx

    model = onnx.load(str(path))
    measured = magnitudes(path, feeds)
    weights = {tensor.name for tensor in model.graph.initializer}
    layers = [n for n in model.graph.node if n.op_type in LAYERS and n.input[1] in weights]
    noise = {node.name: _noise(*measured.get(node.input[0], (0.0, 0.0))) for node in layers}
    order = sorted(noise, key=lambda name: -noise[name])
    attempts: list[tuple[float, list[str]]] = []
    best: bytes = b""
    candidate = path.with_name("quantised.onnx")
    for share in SHARES:
        kept = order[: round(share * len(order))]
        _quantise(path, candidate, feeds, [name for name in order if name not in kept])
        attempts.append((error(candidate), kept))
        logging.getLogger("fmdistill").info(
            "int8: %d of %d layers in float32, relative error %.4f", len(kept), len(order), attempts[-1][0]
        )
        if attempts[-1][0] <= min(value for value, _ in attempts):
            best = candidate.read_bytes()
        candidate.unlink()
        if attempts[-1][0] <= limit:
            break
    path.write_bytes(best)
    chosen = min(attempts, key=lambda attempt: attempt[0])
    return {
        "layers": len(order),
        "float_layers": chosen[1],
        "errors": [{"float_layers": len(kept), "relative_error": value} for value, kept in attempts],
    }


def magnitudes(path: Path, feeds: Feeds) -> dict[str, tuple[float, float]]:
    """Return (largest absolute value, mean square) over `feeds` of each float tensor of the network, by its name."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    graph, floats = (
        model.graph,
        [i.name for i in model.graph.input if i.type.tensor_type.elem_type == TensorProto.FLOAT],
    )
    floats += [v.name for v in graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    floats += [v.name for v in graph.output if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    for name in floats:
        largest, squares = f"{name}/largest", f"{name}/squares"
        graph.node.extend(
            [
                helper.make_node("Abs", [name], [f"{name}/abs"]),
                helper.make_node("ReduceMax", [f"{name}/abs"], [largest], keepdims=0),
                helper.make_node("Mul", [name, name], [f"{name}/mul"]),
                helper.make_node("ReduceMean", [f"{name}/mul"], [squares], keepdims=0),
            ]
        )
        graph.output.extend(helper.make_tensor_value_info(o, TensorProto.FLOAT, []) for o in (largest, squares))
    measuring = path.with_name("measuring.onnx")
    onnx.save(model, str(measuring))
    try:
        session = Session(measuring)
        results = [session(feed) for feed in feeds]
    finally:
        measuring.unlink()
    return {
        name: (
            max(float(result[f"{name}/largest"]) for result in results),
            float(np.mean([result[f"{name}/squares"] for result in results])),
        )
        for name in floats
    }


def _noise(largest: float, mean_square: float) -> float:
    """Return the variance of rounding to 255 steps between -largest and largest, relative to the mean square."""
    return (2 * largest / 255) ** 2 / 12 / mean_square if mean_square > 0 else 0.0


def _quantise(path: Path, out: Path, feeds: Feeds, nodes: Sequence[str]) -> None:
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        """The images that the ranges are measured on."""

        def __init__(self) -> None:
            self.feeds: Iterable[Any] = iter(feeds)

        def get_next(self) -> Any:
            """Return the next feed, None after the last."""
            return next(iter(self.feeds), None)

    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)  # advice to preprocess the model, which was done
    try:
        quantization.quantize_static(
            str(path),
            str(out),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(LAYERS),
            nodes_to_quantize=list(nodes),
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        root.setLevel(level)
