"""The phone formats: each runtime computes what the PyTorch student and segment_anything's own head compute.

The converters are extras, and most are not installed together; a test of one that is missing is skipped.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import clip_run
import numpy as np
import pytest
import sam_exports
import torch

from fmdistill import export
from fmdistill.backbones.sam import PIXEL_MEAN, PIXEL_STD, SamPreprocess
from fmdistill.export import card, checks, phone
from fmdistill.export.phone import PhoneFormat, PhonePart
from fmdistill.export.source import FinishedRun
from fmdistill.predict import artefact
from fmdistill.registry import UserError

PACKAGES = {"coreml": "coremltools", "tflite": "litert_torch", "executorch": "executorch"}


def needs(name: str) -> None:
    if find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed: pip install 'fmdistill[{name}]'")


class SamSource(FinishedRun):
    """A run of a quarter-scale student without its cache: head and preprocessing are given."""

    @property
    def family(self) -> str:
        return "sam"

    @property
    def preprocess(self) -> SamPreprocess:
        return SamPreprocess(256)

    def head(self):
        return HEAD


STUDENT, HEAD = sam_exports.mini()


@pytest.fixture
def sam(tmp_path, monkeypatch) -> FinishedRun:
    from fmdistill import recipe

    monkeypatch.setattr(checks, "pictures", lambda recipe, split, count: checks.photographs()[-2:])
    loaded = recipe.load("recipes/demo/sam_mse.yaml", [f"out={tmp_path}/run"])
    run = clip_run.finish(loaded, STUDENT)
    return SamSource(run, loaded, STUDENT)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("clip")
    return FinishedRun.of(clip_run.finished_tinyvit(folder).out)


def in_torch(changed: str = "", factor: float = 1.0) -> PhoneFormat:
    """Return a format whose files are empty and whose runtime is PyTorch, with one part's outputs changed."""
    networks: dict[str, PhonePart] = {}

    def convert(part: PhonePart, path: Path) -> None:
        networks[path.name] = part
        path.write_bytes(b"network")

    def opened(path: Path) -> phone.Call:
        part = networks[path.name]
        scale = factor if part.name == changed else 1.0

        def call(inputs):
            outputs = part.network(*inputs)
            return [scale * output for output in (outputs if isinstance(outputs, tuple) else (outputs,))]

        return call

    return PhoneFormat("toy", ".net", False, convert, opened)


@pytest.mark.parametrize("points", [2, 4])
def test_the_cut_networks_are_segment_anything_s_own(sam, tmp_path, points):
    out = phone.write(sam, tmp_path / "out", in_torch(), points=points)
    opened = artefact.read(out)
    assert opened.check["miou"] == 1 and opened.check["masks"] == 2 * 2 * 3  # pictures, prompts, masks
    assert opened.check["embedding_error"] == 0 and opened.check["logits_error"] < 1e-5
    assert set(opened.files) == {"ImageEncoder.net", "PromptEncoder.net", "MaskDecoder.net", card.NAME}
    parts = opened.model["parts"]
    assert parts["PromptEncoder"]["inputs"] == {
        "points": {"shape": [1, points, 2], "dtype": "float32"},
        "labels": {"shape": [1, points], "dtype": "int32"},
    }
    assert parts["MaskDecoder"]["outputs"] == ["low_res_masks", "scores"]


def test_wrong_masks_are_not_published(sam, tmp_path):
    for part in ("ImageEncoder", "PromptEncoder", "MaskDecoder"):
        with pytest.raises(UserError, match=r"mean IoU of 0\.\d+ .* below min_miou=0.99; nothing was written"):
            phone.write(sam, tmp_path / "out", in_torch(part, -1.0))
        assert not (tmp_path / "out").exists()
    out = phone.write(sam, tmp_path / "out", in_torch("MaskDecoder", -1.0), min_miou=0.0)
    assert artefact.read(out).check["miou"] < 0.5
    with pytest.raises(UserError, match="mean IoU of"):
        phone.write(sam, tmp_path / "nan", in_torch("MaskDecoder", float("nan")))


def test_constants_and_examples_are_contiguous_tensors_of_their_own():
    source = SimpleNamespace(student=STUDENT, head=lambda: HEAD)
    for part in phone.sam_parts(source, 2, PhoneFormat("x", "", True, lambda *_: None)):
        tensors = [*part.inputs.values(), *part.network.state_dict().values(), *part.network.buffers()]
        assert all(tensor.is_contiguous() for tensor in tensors)
        assert len({value.data_ptr() for value in part.inputs.values()}) == len(part.inputs)


@pytest.mark.slow
def test_torch_export_keeps_every_input_of_the_decoder():
    source = SimpleNamespace(student=STUDENT, head=lambda: HEAD)
    part = phone.sam_parts(source, 2, PhoneFormat("x", "", False, lambda *_: None))[2]
    part.network.requires_grad_(False)
    with torch.no_grad():
        assert phone.exported(part)
        dense = part.inputs["image_embedding"]
        twice = PhonePart(part.name, part.network, {**part.inputs, "dense_embedding": dense}, part.outputs)
        with pytest.raises(AssertionError, match="not close"):  # one tensor for two inputs is exported as one input
            phone.exported(twice)


def test_raw_pixels_are_normalised_in_the_network():
    encoder = phone.sam_parts(
        SimpleNamespace(student=STUDENT, head=lambda: HEAD), 2, PhoneFormat("x", "", True, lambda *_: None)
    )[0].network
    pixels = torch.randint(0, 256, (1, 3, 256, 256)).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), STUDENT((pixels - mean) / std)["embedding"])


def test_a_clip_s_towers_are_compared_on_photographs_and_texts(clip, tmp_path):
    out = phone.write(clip, tmp_path / "out", in_torch())
    opened = artefact.read(out)
    assert opened.kind == "clip" and {"image.net", "text.net"} < set(opened.files)
    assert opened.check["image_cosine"]["min"] > 0.99999 and opened.check["text_cosine"]["min"] > 0.99999
    assert opened.model["parts"]["text"]["inputs"] == {"text": {"shape": [1, 16], "dtype": "int32"}}
    for tower in ("image", "text"):
        with pytest.raises(UserError, match=f"the {tower} tower's embeddings differ"):
            phone.write(clip, tmp_path / "wrong", in_torch(tower, -1.0))
    assert not (tmp_path / "wrong").exists()


def test_what_does_not_fit_is_one_clear_line(sam, clip, tmp_path):
    for source, settings, says in (
        (sam, {"points": 1}, "points=1: expected at least 2 rows"),
        (sam, {"min_cosine": 0.5}, "min_cosine=0.5: is a setting of clip students"),
        (clip, {"points": 3}, "points=3: is a setting of sam students"),
    ):
        with pytest.raises(UserError, match=says):
            phone.write(source, tmp_path / "out", in_torch(), **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_extra_is_one_clear_line(name, clip, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, PACKAGES[name], None)
    with pytest.raises(UserError, match=rf"export {name}: needs the package .*; pip install 'fmdistill\[{name}\]'"):
        export.run(clip.run, name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def run_format(name: str, source: FinishedRun, out: Path, **settings) -> Path:
    from fmdistill.registry import resolve

    return resolve(name, export.FORMATS, "export")(source, out, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tflite", "executorch"])
def test_the_runtime_s_masks_are_pytorch_s(name, sam, tmp_path):
    needs(name)
    check = artefact.read(run_format(name, sam, tmp_path / "out")).check
    assert check["miou"] > 0.999 and check["embedding_error"] < 1e-4 and check["logits_error"] < 1e-3
    print(json.dumps(check))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tflite", "executorch"])
def test_the_runtime_s_embeddings_are_pytorch_s(name, clip, tmp_path):
    needs(name)
    check = artefact.read(run_format(name, clip, tmp_path / "out")).check
    assert check["image_cosine"]["min"] > 0.9999 and check["text_cosine"]["min"] > 0.9999
    print(json.dumps(check))


@pytest.mark.slow
def test_coreml_s_packages_have_apple_s_names(sam, tmp_path):
    needs("coreml")
    import coremltools

    out = run_format("coreml", sam, tmp_path / "out")
    names = {
        "ImageEncoder": ({"image": "imageType"}, ["image_embedding"]),
        "PromptEncoder": (
            {"points": "multiArrayType", "labels": "multiArrayType"}, ["sparse_embeddings", "dense_embeddings"],
        ),
        "MaskDecoder": (
            {name: "multiArrayType" for name in ("image_embedding", "sparse_embedding", "dense_embedding")},
            ["low_res_masks", "scores"],
        ),
    }  # fmt: skip
    shapes = {}
    for part, (inputs, outputs) in names.items():
        described = coremltools.utils.load_spec(str(out / f"{part}.mlpackage")).description
        assert {entry.name: entry.type.WhichOneof("Type") for entry in described.input} == inputs
        assert [entry.name for entry in described.output] == outputs
        shapes |= {entry.name: list(entry.type.multiArrayType.shape) for entry in described.output}
    assert shapes["image_embedding"] == [1, 128, 16, 16] and shapes["low_res_masks"] == [1, 3, 64, 64]
    check = artefact.read(out).check
    assert check == {"compared": False, "reason": "CoreML runs on Apple's systems only"}


@pytest.mark.slow
def test_coreml_s_towers_have_mobileclip_s_names(clip, tmp_path):
    needs("coreml")
    import coremltools

    out = run_format("coreml", clip, tmp_path / "out", precision="fp16")
    for part, name in (("image", "imageType"), ("text", "multiArrayType")):
        described = coremltools.utils.load_spec(str(out / f"{part}.mlpackage")).description
        assert [(entry.name, entry.type.WhichOneof("Type")) for entry in described.input] == [(part, name)]
        (output,) = described.output
        assert output.name == "final_emb_1" and np.prod(output.type.multiArrayType.shape) == 24
