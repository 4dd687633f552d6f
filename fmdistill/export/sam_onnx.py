"""Write a SAM student, with its prompt encoder and mask decoder, as ONNX files in the layouts of other programs."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import PIXEL_MEAN, PIXEL_STD
from fmdistill.export import checks, folder, onnx_file, onnx_precision, sam_check
from fmdistill.export import sam_networks as networks
from fmdistill.export.card import write_card
from fmdistill.export.onnx_precision import Precision
from fmdistill.export.source import FinishedRun
from fmdistill.files import write_whole
from fmdistill.predict import artefact
from fmdistill.predict.onnx_session import Session, onnxruntime
from fmdistill.predict.sam_layouts import LAYOUTS, SamLayout
from fmdistill.predict.sam_onnx import OnnxSamPredictor
from fmdistill.registry import UserError

PICTURES, CALIBRATION = 6, 16
MIN_MIOU = {"fp32": 0.99, "fp16": 0.95, "int8": 0.9}  # below which nothing is written, unless a setting accepts it
INT8_ERROR = 0.05  # relative error of the embedding, at which no more layers are kept in float32


@dataclass(frozen=True)
class SamExport:
    """What is written: the student and head, the layout's name and its fields, and the images to measure with."""

    student: nn.Module
    head: PromptHead
    name: str
    layout: SamLayout
    pictures: Callable[[str, int], list[np.ndarray]]  # of a split, so many
    described: Mapping[str, Any]  # of the run, for the JSON
    # writes further files into the folder and returns what the JSON's `model` says of them
    further: Callable[[Path], Mapping[str, Any]] = lambda folder: {}
    card: Callable[[Path, Mapping[str, Any]], object] = lambda folder, check: None  # writes the model card


def onnx(
    source: FinishedRun, out: Path, precision: Precision = "fp32", single: bool = False, min_miou: float | None = None
) -> Path:
    """Write encoder.onnx and decoder.onnx in segment_anything's own layout, with four masks or one."""
    return _run(source, out, "onnx", precision, min_miou, single=single)


def anylabeling(source: FinishedRun, out: Path, precision: Precision = "fp32", min_miou: float | None = None) -> Path:
    """Write ONNX files and their YAML, for X-AnyLabeling, anylabeling and samexporter."""
    return _run(source, out, "anylabeling", precision, min_miou)


def labelme(source: FinishedRun, out: Path, precision: Precision = "fp32", min_miou: float | None = None) -> Path:
    """Write ONNX files in the layout of osam, the library by which labelme runs models."""
    return _run(source, out, "labelme", precision, min_miou)


def openvino(source: FinishedRun, out: Path, precision: Precision = "fp32", min_miou: float | None = None) -> Path:
    """Write ONNX files with the names and shapes of OpenVINO's model_api."""
    return _run(source, out, "openvino", precision, min_miou)


def transformers(source: FinishedRun, out: Path, precision: Precision = "fp32", min_miou: float | None = None) -> Path:
    """Write the folder of transformers.js and optimum: onnx/, config.json and preprocessor_config.json."""
    return _run(source, out, "transformers", precision, min_miou)


def _run(
    source: FinishedRun, out: Path, name: str, precision: Precision, min_miou: float | None, single: bool = False
) -> Path:
    layout = LAYOUTS[name]
    export = export_of(source, out, name, layout.with_single(single or layout.single))
    return write(export, out, precision, min_miou)


def export_of(source: FinishedRun, out: Path, name: str, layout: SamLayout) -> SamExport:
    """Return the export `name` of a run. Raises UserError if its teacher is no SAM, or `out` is no place for it."""
    if source.family != "sam":
        raise UserError(
            f"export {name}: {source.recipe.out} was distilled from the family '{source.family}'; {name} exports SAM "
            f"students, whose masks come from prompts"
        )
    folder.check_place(out, artefact.NAME, f"an {name}")
    return SamExport(
        source.student,
        source.head(),
        name,
        layout,
        lambda split, count: checks.pictures(source.recipe, split, count),
        source.to_json(),
        card=lambda folder, check: write_card(folder, source, check),
    )


def write(export: SamExport, out: Path, precision: Precision = "fp32", min_miou: float | None = None) -> Path:
    """Write the folder whole, if the masks of its files agree with PyTorch's; return `out`.

    Raises UserError if the head does not fit the student, or the mean IoU is below `min_miou`, by default MIN_MIOU.
    """
    onnxruntime()
    student, head, layout = export.student.eval(), export.head.eval(), export.layout
    model = _model(student, head, layout)
    with folder.whole_folder(out, artefact.NAME, f"an {export.name}") as temporary:
        encoder, decoder = temporary / layout.encoder, temporary / layout.decoder
        encoder.parent.mkdir(exist_ok=True)
        _write_networks(student, head, layout, encoder, decoder)
        converted = _convert(export, model, encoder, decoder, precision)
        if export.name == "openvino":
            for path, kind in ((encoder, "sam_image_encoder"), (decoder, "sam_decoder")):
                onnx_file.add_properties(path, _model_info(kind, export.layout, model))
        predictor = OnnxSamPredictor(encoder, decoder, model, layout)
        check = sam_check.measure(predictor, student, head, export.pictures("validation", PICTURES))
        limit = MIN_MIOU[precision] if min_miou is None else min_miou
        way_out = "" if precision == "fp32" else "choose precision=fp32, or "
        checks.require(check, "miou", limit, "min_miou", f"export {export.name} precision={precision}", way_out)
        for name, text in _companions(export, model, out.name).items():
            write_whole(temporary / name, text)
        model = {**model, **converted, **export.further(temporary)}
        export.card(temporary, check)
        folder.describe(
            temporary,
            kind="sam",
            format=export.name,
            precision=precision,
            model=model,
            check=check,
            source=export.described,
        )
    return out


def _model(student: nn.Module, head: PromptHead, layout: SamLayout) -> dict[str, Any]:
    """Return what a predictor must know. Raises UserError if the student's embedding is not the head's."""
    config = head.config
    side, grid, channels = config["image_size"], config["image_embedding_size"], config["embed_dim"]
    own = getattr(student, "image_size", side)
    if own != side:
        raise UserError(f"export: the student's image side is {own}, its head's {side}; use the cache it learned from")
    with torch.inference_mode():
        shape = tuple(student(torch.zeros(1, 3, side, side))["embedding"].shape[1:])
    if shape != (channels, grid, grid):
        raise UserError(
            f"export: the student's embedding is {shape}, but its head's is {(channels, grid, grid)}; use the cache "
            f"that the student learned from, and a student of its stride"
        )
    return {
        "runtime": "onnx",
        "encoder": layout.encoder,
        "decoder": layout.decoder,
        "image_size": side,
        "embed_dim": channels,
        "grid": grid,
        "opset": onnx_file.OPSET,
        "layout": layout.to_json(),
    }


def _write_networks(student: nn.Module, head: PromptHead, layout: SamLayout, encoder: Path, decoder: Path) -> None:
    """Write both networks in float32."""
    side, low = head.config["image_size"], 4 * head.config["image_embedding_size"]
    shape = (1, head.config["embed_dim"], low // 4, low // 4)
    image = {layout.image: torch.zeros(1, 3, side, side)}
    if layout.batched:
        names = ["image_embeddings", "image_positional_embeddings"]
        axes = {name: {0: "batch"} for name in (layout.image, *names)}
        onnx_file.write(networks.BatchedEncoder(student, head), image, names, encoder, dynamic=axes)
        inputs: dict[str, Tensor] = {
            "input_points": torch.zeros(1, 1, 2, 2),
            "input_labels": torch.ones(1, 1, 2, dtype=torch.int64),
            **{name: torch.zeros(shape) for name in names},
        }
        axes = {name: {0: "batch"} for name in names} | {
            name: {0: "batch", 1: "prompts", 2: "points"} for name in ("input_points", "input_labels")
        }
        axes |= {name: {0: "batch", 1: "prompts"} for name in ("iou_scores", "pred_masks")}
        network = networks.BatchedDecoder(head, layout)
        onnx_file.write(network, inputs, ["iou_scores", "pred_masks"], decoder, dynamic=axes)
    else:
        network, axes = networks.SquareEncoder(student, layout.padding), None
        if layout.raw:
            frame = layout.frame or side
            network = networks.PixelEncoder(student, side, frame)
            image = {layout.image: torch.zeros(*(layout.canvas or (frame, frame)), 3)}
            axes = {layout.image: {0: "height", 1: "width"}}
        onnx_file.write(network, image, ["image_embeddings"], encoder, dynamic=axes)
        outputs = [layout.masks, "iou_predictions", "low_res_masks"]
        axes = {name: {1: "points"} for name in ("point_coords", "point_labels")}
        axes[layout.masks] = {2: "height", 3: "width"}
        if layout.any_mask:
            axes["mask_input"] = {2: "mask_height", 3: "mask_width"}
        network = networks.OfficialDecoder(head, layout)
        onnx_file.write(network, _decoder_inputs(layout, shape, low), outputs, decoder, dynamic=axes)


def _decoder_inputs(layout: SamLayout, shape: tuple[int, ...], low: int) -> dict[str, Tensor]:
    side = layout.mask_side or low
    return {
        "image_embeddings": torch.zeros(shape),
        "point_coords": torch.zeros(1, 5, 2),
        "point_labels": torch.ones(1, 5),
        "mask_input": torch.zeros(1, 1, side, side),
        "has_mask_input": torch.zeros(layout.flag_shape),
        layout.size: torch.tensor([480, 640]).to(getattr(torch, layout.size_type)).reshape(layout.size_shape),
    }


def _convert(
    export: SamExport, model: Mapping[str, Any], encoder: Path, decoder: Path, precision: Precision
) -> dict[str, Any]:
    """Convert both files in place; return what the JSON says of it."""
    if precision == "fp32":
        return {}
    predictor = OnnxSamPredictor(encoder, decoder, model, export.layout)
    images = export.pictures("train", CALIBRATION)
    feeds = [{export.layout.image: predictor.encoder_input(picture)} for picture in images]
    if precision == "fp16":
        recorded = _recorded(predictor, feeds[:4])
        kept = onnx_precision.to_half(encoder, feeds[:4])
        kept_decoder = onnx_precision.to_half(decoder, recorded, networks.HALF)
        return {"float_layers": {"encoder": kept, "decoder": kept_decoder}, "half_parts": networks.HALF}
    expected = [predictor.encode(feed[export.layout.image])["image_embeddings"] for feed in feeds[:4]]

    def error(path: Path) -> float:
        session = Session(path)
        actual = [session(feed)["image_embeddings"] for feed in feeds[:4]]
        return checks.relative_error(np.stack(actual), np.stack(expected))

    return {"int8": {"encoder": onnx_precision.to_int8(encoder, feeds, error, INT8_ERROR), "decoder": "fp32"}}


def _recorded(predictor: OnnxSamPredictor, feeds: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Return the decoder's inputs for some prompts on the images, to measure its activations with."""
    recorded: list[dict[str, np.ndarray]] = []
    decode = predictor._decoder

    def record(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        recorded.append(dict(inputs))
        return decode(inputs)

    predictor._decoder = record  # type: ignore[assignment]
    side = predictor.layout.frame or predictor.image_size
    for number, feed in enumerate(feeds):
        features = predictor.encode(feed[predictor.layout.image])
        for prompt in sam_check.prompts(number)[:5]:
            predictor.decode(features, prompt.points * side, prompt.labels, None, predictor.layout.canvas or (480, 640))
    return recorded


def _companions(export: SamExport, model: Mapping[str, Any], title: str) -> dict[str, str]:
    """Return the further files of the layout, by name."""
    if export.name == "anylabeling":
        lines = {
            "type": "segment_anything",
            "name": f"{title}-fmdistill",
            "provider": "fmdistill",
            "display_name": f"{title} (fmdistill)",
            "encoder_model_path": export.layout.encoder,
            "decoder_model_path": export.layout.decoder,
            "input_size": 1024,
            "max_width": 1024,
            "max_height": 682,
        }
        text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items())
        return {"config.yaml": text}
    if export.name == "transformers":
        return {
            "config.json": json.dumps(_transformers_config(export.head, model), indent=2) + "\n",
            "preprocessor_config.json": json.dumps(_processor_config(model["image_size"]), indent=2) + "\n",
        }
    return {}


def _model_info(kind: str, layout: SamLayout, model: Mapping[str, Any]) -> dict[str, str]:
    """Return what OpenVINO's model_api reads in an ONNX file of its class `kind`, so that it needs no settings."""
    settings: dict[str, Any] = {"model_type": kind, "image_size": model["image_size"]}
    if kind == "sam_image_encoder":
        mean, std = (" ".join(map(str, values)) for values in (PIXEL_MEAN, PIXEL_STD))
        settings |= {"resize_type": "fit_to_window", "mean_values": mean, "scale_values": std}
        settings["pad_value"] = layout.padding
    return {f"model_info {name}": str(value) for name, value in settings.items()}


def _transformers_config(head: PromptHead, model: Mapping[str, Any]) -> dict[str, Any]:
    config, side, grid = head.config, model["image_size"], model["grid"]
    return {
        "model_type": "sam",
        "architectures": ["SamModel"],
        "initializer_range": 0.02,
        "vision_config": {
            "model_type": "sam_vision_model",
            "image_size": side,
            "patch_size": side // grid,
            "output_channels": config["embed_dim"],
            "num_pos_feats": config["embed_dim"] // 2,
        },
        "prompt_encoder_config": {
            "hidden_size": config["embed_dim"],
            "image_size": side,
            "patch_size": side // grid,
            "image_embedding_size": grid,
            "mask_input_channels": config["mask_in_chans"],
            "num_point_embeddings": 4,
        },
        "mask_decoder_config": {
            "hidden_size": config["embed_dim"],
            "mlp_dim": config["mlp_dim"],
            "num_attention_heads": config["num_heads"],
            "num_hidden_layers": config["transformer_depth"],
            "num_multimask_outputs": config["num_multimask_outputs"],
            "iou_head_depth": config["iou_head_depth"],
            "iou_head_hidden_dim": config["iou_head_hidden_dim"],
        },
        "transformers.js_config": {"dtype": "fp32"},  # the name without a suffix, whatever the files' own precision
    }


def _processor_config(side: int) -> dict[str, Any]:
    return {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": side},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in PIXEL_MEAN],
        "image_std": [value / 255 for value in PIXEL_STD],
        "do_pad": True,
        "pad_size": {"height": side, "width": side},
    }
