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
    largest = magnitudes(path, feeds)
    named = [node for node in model.graph.node if any(part in node.name for part in parts)]
    overflow = [n.name for n in named if any(largest.get(name, 0.0) > LARGEST for name in (*n.input, *n.output))]
    outside = {node.name for node in model.graph.node} - {node.name for node in named}
    half = convert_float_to_float16(model, keep_io_types=True, node_block_list=sorted({*overflow, *outside}))
    _join(half.graph)
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


def _join(graph: Any) -> None:
    """Remove casts to float16 and back between two nodes in float32, which the converter puts around every such node.

    Values between them would overflow in float16 all the same.
    """
    from onnx import TensorProto

    made = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    kind = {name: node.attribute[0].i for name, node in made.items()}
    halved = {name: made[name].input[0] for name in made if kind[name] == TensorProto.FLOAT16}
    # the converter casts nothing but float32 to float16
    restored = {
        n: halved[made[n].input[0]] for n in made if kind[n] == TensorProto.FLOAT and made[n].input[0] in halved
    }
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = restored.get(name, name)
    outputs = {output.name for output in graph.output}
    while idle := [
        node
        for node in graph.node
        if node.op_type == "Cast" and node.output[0] not in outputs | {name for n in graph.node for name in n.input}
    ]:
        for node in idle:
            graph.node.remove(node)


def to_int8(
    path: Path,
    feeds: Feeds,
    error: Callable[[Path], float],
    limit: float,
) -> dict[str, Any]:
    """Quantise convolutions and linear layers to int8, statically; return what was kept in float32 and the errors.

    Weights have a scale for each channel, activations one for each tensor, from their range on `feeds`. Layers are
    ordered by the noise that 8 bits add to their input or output, and more of the noisiest stay in float32, until
    `error` of the quantised file is at most `limit`; the best of all attempts is kept.
    """
    import onnx

    model = onnx.load(str(path))
    weights = {tensor.name for tensor in model.graph.initializer}
    layers = [n for n in model.graph.node if n.op_type in LAYERS and n.input[1] in weights]
    axes = {name: 1 if node.op_type == "Conv" else -1 for node in layers for name in (node.input[0], node.output[0])}
    noise = rounding_noise(path, feeds[:4], axes)
    loss = {node.name: max(noise[node.input[0]], noise[node.output[0]]) for node in layers}
    order = sorted(loss, key=lambda name: -loss[name])
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


def magnitudes(path: Path, feeds: Feeds) -> dict[str, float]:
    """Return the largest absolute value over `feeds` of each float tensor of the network, by its name."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    names = [value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT]
    added = {}
    for name in names:
        added[name] = [
            helper.make_node("Abs", [name], [f"{name}/abs"]),
            helper.make_node("ReduceMax", [f"{name}/abs"], [f"{name}/measured"], keepdims=0),
        ]
    return {name: max(results) for name, results in _measure(path, feeds, added).items()}


def rounding_noise(path: Path, feeds: Feeds, axes: Mapping[str, int]) -> dict[str, float]:
    """Return by name how much of a tensor is rounding noise after 8 bits for its whole range, from 0 to 1.

    It is the mean over positions of noise / (mean square + noise), with the mean square over the tensor's channels,
    whose axis `axes` gives: a layer norm scales each position by itself, so a small one loses most.
    """
    import onnx
    from onnx import helper, numpy_helper

    def constant(name: str, value: Any) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value)))

    step = np.float32((2 / 255) ** 2 / 12)
    added = {}
    for name, axis in axes.items():
        made = [f"{name}/{part}" for part in ("square", "max", "step", "noise", "axis", "mean", "sum", "share")]
        square, largest, scale, noise, channel, mean, total, share = made
        added[name] = [
            constant(scale, step),
            constant(channel, np.array([axis])),
            helper.make_node("Mul", [name, name], [square]),
            helper.make_node("ReduceMax", [square], [largest], keepdims=0),
            helper.make_node("Mul", [largest, scale], [noise]),
            helper.make_node("ReduceMean", [square, channel], [mean], keepdims=0),
            helper.make_node("Add", [mean, noise], [total]),
            helper.make_node("Div", [noise, total], [share]),
            helper.make_node("ReduceMean", [share], [f"{name}/measured"], keepdims=0),
        ]
    return {name: float(np.mean(results)) for name, results in _measure(path, feeds, added).items()}


def _measure(path: Path, feeds: Feeds, added: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
    """Run the network with the nodes that `added` has by tensor; return NAME/measured of each feed, by tensor."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(str(path))
    for name, nodes in added.items():
        model.graph.node.extend(nodes)
        model.graph.output.append(helper.make_tensor_value_info(f"{name}/measured", TensorProto.FLOAT, []))
    measuring = path.with_name("measuring.onnx")
    onnx.save(model, str(measuring))
    try:
        session = Session(measuring)
        results = [session(feed) for feed in feeds]
    finally:
        measuring.unlink()
    return {name: [float(result[f"{name}/measured"]) for result in results] for name in added}


def _quantise(path: Path, out: Path, feeds: Feeds, nodes: Sequence[str]) -> None:
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        """The images that the ranges are measured on."""

        def __init__(self) -> None:
            self.feeds: Iterable[Any] = iter(feeds)

        def get_next(self) -> Any:
            """Return the next feed, None after the last."""
            return next(iter(self.feeds), None)

    root, level, handlers = logging.getLogger(), logging.getLogger().level, list(logging.getLogger().handlers)
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
            weight_type=quantization.QuantType.QUInt8,  # int8's products saturate on CPUs with AVX2 but without VNNI
            activation_type=quantization.QuantType.QUInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers  # onnxruntime's tools add one, which would print every line again
