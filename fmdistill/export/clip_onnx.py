"""Write a CLIP student and its text tower as ONNX files, in the layouts of immich and transformers.js, or plainly."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmdistill.export import checks, clip_check, clip_tokenizer, onnx_file, onnx_precision
from fmdistill.export.card import write_card
from fmdistill.export.clip_towers import ClipTowers, ImageNetwork, TextNetwork
from fmdistill.export.folder import check_place, describe, whole_folder
from fmdistill.export.onnx_precision import Precision
from fmdistill.export.source import FinishedRun
from fmdistill.files import write_whole
from fmdistill.predict import artefact, onnx_session
from fmdistill.predict.clip_onnx import embed_batches

SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}  # transformers.js's, by its setting dtype
RESAMPLING = {"bilinear": 2, "bicubic": 3}  # PIL's numbers, which transformers states
IMMICH_OPSET = 19
OWN = "an fmdistill"  # what an earlier export at the same place must be
PICTURES, CALIBRATION = 8, 32  # of the recipe, for the check and for the ranges of int8
INT8_ERROR = 0.1  # of an embedding, relative to its length: a cosine of 0.995


@dataclass(frozen=True)
class _Layout:
    """The names, number types and sizes of one format's files; `batch` None means any number."""

    format: str
    image: str
    text: str
    tokenizer: str  # the folder of its files
    image_names: tuple[str, str]
    text_names: tuple[str, str]
    token_type: torch.dtype
    unit: bool
    batch: int | None
    opset: int


def immich(source: FinishedRun, out: Path, precision: Precision = "fp32", min_cosine: float | None = None) -> Path:
    """Write a CLIP's ONNX files in the folder layout of immich's machine-learning service."""
    layout = _Layout(
        "immich", "visual/model.onnx", "textual/model.onnx", "textual",
        ("image", "embedding"), ("text", "embedding"), torch.int32, unit=True, batch=1, opset=IMMICH_OPSET,
    )  # fmt: skip
    return _write(source, out, layout, _immich_files, precision, min_cosine)


def transformers(
    source: FinishedRun, out: Path, precision: Precision = "fp32", min_cosine: float | None = None
) -> Path:
    """Write a CLIP's ONNX files in the folder layout of transformers.js and Hugging Face's CLIP."""
    image, text = (f"onnx/{tower}_model{SUFFIXES[precision]}.onnx" for tower in ("vision", "text"))
    layout = _Layout(
        "transformers", image, text, "", ("pixel_values", "image_embeds"), ("input_ids", "text_embeds"),
        torch.int64, unit=False, batch=None, opset=onnx_file.OPSET,
    )  # fmt: skip
    return _write(source, out, layout, _transformers_files, precision, min_cosine)


def onnx(source: FinishedRun, out: Path, precision: Precision = "fp32", min_cosine: float | None = None) -> Path:
    """Write a CLIP's image tower and text tower as plain ONNX files of any batch, and its tokenizer."""
    layout = _Layout(
        "onnx", "image.onnx", "text.onnx", "tokenizer", ("image", "embedding"), ("text", "embedding"),
        torch.int64, unit=False, batch=None, opset=onnx_file.OPSET,
    )  # fmt: skip
    return _write(source, out, layout, _plain_files, precision, min_cosine)


def _write(
    source: FinishedRun,
    out: Path,
    layout: _Layout,
    write_files: Callable[[ClipTowers, Path], None],
    precision: str,
    min_cosine: float | None,
) -> Path:
    check_place(out, artefact.NAME, OWN)
    onnx_session.onnxruntime()
    towers = ClipTowers.of(source, layout.format)
    with whole_folder(out, artefact.NAME, OWN) as folder:
        write_files(towers, folder)
        pad = clip_tokenizer.end_token(towers.tokenizer) if _pads_with_end(layout, towers) else None
        model_cfg = towers.config["model_cfg"]
        clip_tokenizer.write(towers.tokenizer, model_cfg, folder / layout.tokenizer, pad)
        _write_networks(towers, layout, folder)
        described = {**_described(towers, layout), **_convert(towers, layout, folder, precision, source)}
        pictures = [*checks.pictures(source.recipe, "validation", PICTURES), *checks.photographs()]
        figures = _checked(towers, layout, folder, pictures, precision, min_cosine)
        write_card(folder, source, figures)
        describe(
            folder, kind="clip", format=layout.format, precision=precision, model=described, check=figures,
            source=source.to_json(),
        )  # fmt: skip
    return out


def _pads_with_end(layout: _Layout, towers: ClipTowers) -> bool:
    """Return whether texts are padded with the end token, as OpenAI's model on Hugging Face is.

    transformers cuts a padding token out of every text, so "!", which is open_clip's, would be misread.
    """
    return layout.format == "transformers" and towers.causal and clip_tokenizer.end_token(towers.tokenizer) is not None


def _write_networks(towers: ClipTowers, layout: _Layout, folder: Path) -> None:
    side, tokens = towers.preprocess.image_size, towers.tokenizer(["a photo of a cat", "a dog"])
    examples = layout.batch or 2  # a batch of one would become a constant
    any_length = _pads_with_end(layout, towers)
    text_tower = TextNetwork(
        towers.text_model,
        layout.unit,
        towers.context_length,
        towers.tokenizer.eot_token_id if any_length else None,
    )
    generator = torch.Generator().manual_seed(0)
    image: Tensor = torch.randn(examples, 3, side, side, generator=generator)
    text: Tensor = tokens[:examples].to(layout.token_type)
    for network, path, names, example in (
        (ImageNetwork(towers.student, layout.unit), layout.image, layout.image_names, image),
        (text_tower, layout.text, layout.text_names, text),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        dynamic = {} if layout.batch else {name: {0: "batch"} for name in names}
        if any_length and network is text_tower:
            dynamic[names[0]] = {0: "batch", 1: "tokens"}
        onnx_file.write(network, {names[0]: example}, [names[1]], folder / path, dynamic=dynamic, opset=layout.opset)


def _convert(towers: ClipTowers, layout: _Layout, folder: Path, precision: str, source: FinishedRun) -> dict[str, Any]:
    """Convert both files in place; return what the JSON says of it."""
    paths = {"image": folder / layout.image, "text": folder / layout.text}
    if precision == "fp16":
        for path in paths.values():
            onnx_precision.store_half(path)
    if precision != "int8":
        return {}
    photos = clip_check.pixels(towers, checks.pictures(source.recipe, "train", CALIBRATION))
    examples = {"image": photos, "text": towers.tokenizer(list(clip_check.CALIBRATION_TEXTS)).to(layout.token_type)}
    names = {"image": layout.image_names[0], "text": layout.text_names[0]}
    converted = {}
    for tower, path in paths.items():
        feeds = [{names[tower]: example[None].numpy()} for example in examples[tower]]
        converted[tower] = onnx_precision.to_int8(path, feeds, _error(path, names[tower], feeds), INT8_ERROR)
    return {"int8": converted}


def _error(path: Path, name: str, feeds: Sequence[Mapping[str, np.ndarray]]) -> Callable[[Path], float]:
    """Return a function that compares another file with `path`: the relative error of its embeddings."""

    def embeddings(file: Path) -> np.ndarray:
        embed = embed_batches(onnx_session.Session(file))
        return np.concatenate([embed(feed[name]) for feed in feeds[:8]])

    expected = embeddings(path)
    return lambda candidate: checks.relative_error(embeddings(candidate), expected)


def _checked(
    towers: ClipTowers,
    layout: _Layout,
    folder: Path,
    pictures: Sequence[np.ndarray],
    precision: str,
    min_cosine: float | None,
) -> dict[str, Any]:
    kwargs = towers.config["model_cfg"]["text_cfg"].get("tokenizer_kwargs", {})
    tokens = clip_tokenizer.tokenize(
        folder / layout.tokenizer, clip_check.TEXTS, towers.context_length, kwargs.get("clean") == "canonicalize"
    )
    image, text = (embed_batches(onnx_session.Session(folder / path)) for path in (layout.image, layout.text))
    return clip_check.compare(towers, image, text, pictures, tokens, precision, min_cosine)


def _described(towers: ClipTowers, layout: _Layout) -> dict[str, Any]:
    return {
        "runtime": "onnx",
        "image": layout.image,
        "text": layout.text,
        "tokenizer_files": layout.tokenizer,
        "image_size": towers.preprocess.image_size,
        "context_length": towers.context_length,
        "embed_dim": towers.dim,
        "normalised": layout.unit,
        "scale": towers.scale,
        "preprocess": towers.preprocess.to_json(),
        "clip": {"model_cfg": towers.config["model_cfg"], "tokenizer": towers.config["tokenizer"]},
    }


def _immich_files(towers: ClipTowers, folder: Path) -> None:
    preprocess = towers.preprocess
    _json(folder / "config.json", towers.config["model_cfg"])
    cfg = {
        "size": [preprocess.image_size, preprocess.image_size],
        "mode": "RGB",
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": preprocess.resize_mode,
        "fill_color": 0,
    }
    _json(folder / "visual/preprocess_cfg.json", cfg)


def _transformers_files(towers: ClipTowers, folder: Path) -> None:
    preprocess, side = towers.preprocess, towers.preprocess.image_size
    square = {"height": side, "width": side}
    squash = preprocess.resize_mode == "squash"
    cfg = {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": side},
        "resample": RESAMPLING[preprocess.interpolation],
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
    _json(folder / "preprocessor_config.json", cfg)
    text_cfg = towers.config["model_cfg"]["text_cfg"]
    text = {"max_position_embeddings": towers.context_length, "vocab_size": text_cfg.get("vocab_size", 49408)}
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": towers.dim,
        "logit_scale_init_value": float(torch.tensor(towers.scale).log()),
        "text_config": {"model_type": "clip_text_model", "projection_dim": towers.dim, **text},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": towers.dim, "image_size": side},
    }
    _json(folder / "config.json", config)


def _plain_files(towers: ClipTowers, folder: Path) -> None:
    """Write nothing more: the folder's fmdistill.json states the preprocessing."""


def _json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")
