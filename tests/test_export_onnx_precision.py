import numpy as np
import onnx
import pytest
import sam_exports
import torch
from torch import nn

from fmdistill.backbones.promptable import PromptHead
from fmdistill.export import onnx_file, onnx_precision, sam_onnx
from fmdistill.export.checks import relative_error
from fmdistill.predict import artefact
from fmdistill.predict.onnx_session import Session


class Steps(nn.Module):
    """Three convolutions with a channel `outlier` times as large as the others before the last."""

    def __init__(self, outlier: float = 1.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 8), (8, 8), (8, 4)))
        self.register_buffer("scale", torch.ones(8, 1, 1))
        self.scale[0] = outlier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(torch.relu(self.first(x))) * self.scale)


class Normed(nn.Module):
    """Two convolutions and between them a layer norm over channels, whose squares exceed float16's range."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) * 2000
        x = x - x.mean(1, keepdim=True)
        return self.second(x / torch.sqrt((x**2).mean(1, keepdim=True) + 1e-6))


def written(network: nn.Module, path):
    """The network as a file, its feeds, and its outputs in PyTorch."""
    images = torch.randn(4, 1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    onnx_file.write(network, {"x": images[0]}, ["y"], path)
    with torch.no_grad():
        return [{"x": image.numpy()} for image in images], np.stack([network(image).numpy() for image in images])


def outputs(path, feeds):
    return np.stack([Session(path)(feed)["y"] for feed in feeds])


def test_magnitudes_and_noise_are_those_of_the_activations(tmp_path):
    feeds, right = written(Steps(), tmp_path / "a.onnx")
    assert onnx_precision.magnitudes(tmp_path / "a.onnx", feeds)["y"] == pytest.approx(np.abs(right).max(), rel=1e-5)
    shares = []
    for image in right:
        noise = (2 * np.abs(image).max() / 255) ** 2 / 12
        shares.append((noise / ((image**2).mean(1) + noise)).mean())
    measured = onnx_precision.rounding_noise(tmp_path / "a.onnx", feeds, {"y": 1})["y"]
    assert measured == pytest.approx(np.mean(shares), rel=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_half_keeps_layers_that_overflow_in_float32(tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    feeds, right = written(Normed(), path)
    kept = onnx_precision.to_half(path, feeds)
    assert "/Pow" in kept and "/second/Conv" not in kept
    assert relative_error(outputs(path, feeds), right) < 5e-3
    assert Session(path).inputs["x"][0] == "tensor(float)"

    feeds, _ = written(Normed(), path)
    monkeypatch.setattr(onnx_precision, "_join", lambda graph: None)  # the converter's casts between kept layers
    assert onnx_precision.to_half(path, feeds) == kept
    assert relative_error(outputs(path, feeds), right) > 0.5


def test_half_converts_only_the_named_parts(tmp_path):
    path = tmp_path / "a.onnx"
    feeds, _ = written(Steps(), path)
    onnx_precision.to_half(path, feeds, ("/second/",))
    kinds = {t.name.split(".")[0]: t.data_type for t in onnx.load(str(path)).graph.initializer if "weight" in t.name}
    assert kinds == {"first": 1, "second": 10, "third": 1}


def test_int8_keeps_the_layer_with_the_outlier_in_float32(tmp_path):
    path = tmp_path / "a.onnx"
    feeds, right = written(Steps(outlier=300.0), path)

    def error(candidate):
        return relative_error(outputs(candidate, feeds), right)

    report = onnx_precision.to_int8(path, feeds, error, limit=0.01)
    assert report["layers"] == 3 and [attempt["float_layers"] for attempt in report["errors"]] == [0, 0, 0, 1, 1]
    assert len(report["float_layers"]) == 1 and report["float_layers"] != ["/first/Conv"]
    assert error(path) == pytest.approx(min(attempt["relative_error"] for attempt in report["errors"]))
    assert report["errors"][-1]["relative_error"] < report["errors"][0]["relative_error"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]

    feeds, right = written(Steps(), path)
    report = onnx_precision.to_int8(path, feeds, error, limit=0.03)  # 0.18 if products saturate
    assert report["float_layers"] == [] and len(report["errors"]) == 1
    used = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert "QuantizeLinear" in used and "DequantizeLinear" in used


@pytest.mark.slow
@pytest.mark.parametrize("precision, floor", [("fp16", 0.99), ("int8", 0.8)])
def test_the_packaged_sam_mini_stays_itself(tmp_path, precision, floor):
    from fmdistill.mini.sam import sam_mini_student

    student = sam_mini_student("packaged").eval()
    assert isinstance(student.head, PromptHead)
    sizes = {}
    for kind in ("fp32", precision):
        out = sam_onnx.write(sam_exports.export(student, student.head, "onnx"), tmp_path / kind, kind, 0.5)  # type: ignore[arg-type]
        sizes[kind] = (out / "encoder.onnx").stat().st_size
        made = artefact.read(out)
    assert made.check["miou"] >= floor
    assert sizes[precision] < 0.6 * sizes["fp32"]
