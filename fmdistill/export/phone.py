"""Write a student and its teacher's head as a folder of networks for a phone's runtime, each of static shapes."""

# Legend: N prompt rows, C channels, g tokens per side, n = 4 g the low resolution, S the image side, D the width of an
# embedding, L tokens of a text.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import PIXEL_MEAN, PIXEL_STD
from fmdistill.evaluate.masks import iou, pack
from fmdistill.export import checks, clip_check
from fmdistill.export.card import write_card
from fmdistill.export.clip_towers import ClipTowers, ImageNetwork, TextNetwork
from fmdistill.export.folder import check_place, describe, whole_folder
from fmdistill.export.sam_networks import PromptTokens, SquareEncoder
from fmdistill.export.source import FinishedRun, check_family
from fmdistill.predict import artefact
from fmdistill.predict.sam_layouts import LAYOUTS
from fmdistill.registry import UserError

PICTURES, ROWS, MIN_MIOU = 6, 2, 0.99
Call = Callable[[Sequence[Tensor]], list[Tensor]]  # an exported network in its runtime


@dataclass(frozen=True)
class PhonePart:
    """One network of an export: an example of each input by name, and the names of its outputs."""

    name: str
    network: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]

    def to_json(self, file: str) -> dict[str, Any]:
        """Return what an exported folder's JSON says of the part."""
        inputs = {
            name: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in self.inputs.items()
        }
        return {"file": file, "inputs": inputs, "outputs": list(self.outputs)}


@dataclass(frozen=True)
class PhoneFormat:
    """How a runtime's files are made and opened; `open` is None if the runtime is not on this system.

    With `raw` the image is given as pixels of 0..255, else normalised.
    """

    name: str
    suffix: str
    raw: bool
    convert: Callable[[PhonePart, Path], None]
    open: Callable[[Path], Call] | None = None
    reason: str = ""  # why it is None


class RawPixels(nn.Module):
    """An encoder on pixels of 0..255; `mean` and `std` are in the same units."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels_13SS: Tensor) -> Tensor:
        """Return the encoder's output for RGB pixels (1, 3, S, S)."""
        return self.encoder((pixels_13SS - self.mean) / self.std)


class FixedPrompts(nn.Module):
    """SAM's prompt encoder on N rows: points, corners of a box, and padding."""

    def __init__(self, head: PromptHead):
        super().__init__()
        self.tokens = PromptTokens(head.prompt_encoder, LAYOUTS["onnx"])
        self.grid = head.config["image_embedding_size"]

    def forward(self, points_1N2: Tensor, labels_1N: Tensor) -> tuple[Tensor, Tensor]:
        """Return sparse (1, N, C) and dense (1, C, g, g) embeddings; labels are those of the ONNX decoder."""
        dense = self.tokens.no_mask().expand(1, -1, self.grid, self.grid)
        return self.tokens.points(points_1N2, labels_1N), dense.clone()


class FixedDecoder(nn.Module):
    """SAM's mask decoder for one prompt, with the grid's positional encoding as a constant."""

    own: Tensor
    grid: Tensor

    def __init__(self, head: PromptHead):
        super().__init__()
        self.decoder = head.mask_decoder
        own = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])[None]
        grid = head.prompt_encoder.get_dense_pe().detach().contiguous()  # ExecuTorch reads a permuted constant wrongly
        self.register_buffer("grid", grid, persistent=False)
        self.register_buffer("own", own.detach().clone(), persistent=False)

    def forward(self, embedding: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (1, 3, n, n) and predicted IoU (1, 3) of the masks 1 to 3."""
        source = embedding + dense
        out, attended = self.decoder.transformer(source, self.grid, torch.cat([self.own, sparse], dim=1))
        upscaled = self.decoder.output_upscaling(attended.transpose(1, 2).reshape(source.shape))
        hyper = torch.stack([mlp(out[:, 1 + i]) for i, mlp in enumerate(self.decoder.output_hypernetworks_mlps)], dim=1)
        logits = (hyper @ upscaled.flatten(2)).reshape(1, -1, *upscaled.shape[-2:])
        return logits[:, 1:], self.decoder.iou_prediction_head(out[:, 0])[:, 1:]


def write(
    source: FinishedRun,
    out: Path,
    format: PhoneFormat,
    precision: str = "fp32",
    points: int | None = None,
    min_miou: float | None = None,
    min_cosine: float | None = None,
) -> Path:
    """Write the folder whole, if what its runtime computes agrees with PyTorch; return `out`.

    Raises UserError if a setting is the other family's, the head does not fit the student, or masks or embeddings
    differ by more than the limits, by default a mean IoU of 0.99 and a cosine of 0.9999.
    """
    kind = check_family(source, format.name, {"points": points, "min_miou": min_miou, "min_cosine": min_cosine})
    if points is not None and points < 2:
        raise UserError(f"export.points={points}: expected at least 2 rows, for a click and its padding, or for a box")
    what = f"a {format.name}"
    check_place(out, artefact.NAME, what)
    towers = ClipTowers.of(source, format.name) if kind == "clip" else None
    parts = sam_parts(source, points or ROWS, format) if towers is None else clip_parts(towers, format)
    with whole_folder(out, artefact.NAME, what) as folder:
        paths = {part.name: folder / f"{part.name}{format.suffix}" for part in parts}
        for part in parts:
            part.network.train().eval().requires_grad_(False)  # train() forgets attention biases that timm has cached
            with torch.no_grad():
                format.convert(part, paths[part.name])
        calls = None if format.open is None else {name: format.open(path) for name, path in paths.items()}
        check = _check(source, towers, calls, format, points or ROWS, min_miou, min_cosine)
        write_card(folder, source, check)
        described = {part.name: part.to_json(paths[part.name].name) for part in parts}
        model = {"runtime": format.name, "parts": described, "preprocess": source.preprocess.to_json()}
        describe(
            folder, kind=kind, format=format.name, precision=precision, model=model, check=check,
            source=source.to_json(),
        )  # fmt: skip
    return out


def exported(part: PhonePart) -> Any:
    """Return the part as torch.export's program, after a comparison on other inputs than its examples."""
    program = torch.export.export(part.network, tuple(part.inputs.values()))
    drawn = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(value.shape, generator=drawn) if value.is_floating_point() else value.flip(-1)
        for value in part.inputs.values()
    ]
    torch.testing.assert_close(program.module()(*inputs), part.network(*inputs), rtol=1e-3, atol=1e-3)
    return program


def sam_parts(source: FinishedRun, points: int, format: PhoneFormat) -> list[PhonePart]:
    """Return SAM's three networks, by the names of Apple's packages. UserError if the student does not fit the head."""
    student, head = source.student.eval(), source.head()
    side, channels, grid = (head.config[name] for name in ("image_size", "embed_dim", "image_embedding_size"))
    image, dense = torch.zeros(1, 3, side, side), torch.zeros(1, channels, grid, grid)
    if (own := getattr(student, "image_size", side)) != side:
        raise UserError(
            f"export {format.name}: the student's image side is {own}, its head's {side}; use its own cache"
        )
    with torch.no_grad():
        shape = student(image)["embedding"].shape
    if shape != dense.shape:
        raise UserError(
            f"export {format.name}: the student's embedding is {tuple(shape[1:])}, but its head's is "
            f"{(channels, grid, grid)}; use the cache that the student learned from, and a student of its stride"
        )
    encoder = SquareEncoder(student)
    rows = {"points": torch.full((1, points, 2), side / 2), "labels": torch.ones(1, points, dtype=torch.int32)}
    embeddings = {
        "image_embedding": dense,
        "sparse_embedding": torch.zeros(1, points, channels),
        "dense_embedding": dense.clone(),  # torch.export takes one tensor given twice for one input
    }
    return [
        PhonePart(
            "ImageEncoder",
            RawPixels(encoder, PIXEL_MEAN, PIXEL_STD) if format.raw else encoder,
            {"image": image},
            ("image_embedding",),
        ),
        PhonePart("PromptEncoder", FixedPrompts(head), rows, ("sparse_embeddings", "dense_embeddings")),
        PhonePart("MaskDecoder", FixedDecoder(head), embeddings, ("low_res_masks", "scores")),
    ]


def clip_parts(towers: ClipTowers, format: PhoneFormat) -> list[PhonePart]:
    """Return CLIP's two towers, by the names of MobileCLIP's packages; the embeddings are not normalised."""
    preprocess, encoder = towers.preprocess, ImageNetwork(towers.student, unit=False)
    mean, std = ([255 * value for value in values] for values in (preprocess.mean, preprocess.std))
    image = {"image": torch.zeros(1, 3, preprocess.image_size, preprocess.image_size)}
    text = {"text": towers.tokenizer(["a photo"]).to(torch.int32)}
    return [
        PhonePart("image", RawPixels(encoder, mean, std) if format.raw else encoder, image, ("final_emb_1",)),
        PhonePart("text", TextNetwork(towers.text_model, unit=False), text, ("final_emb_1",)),
    ]


def _check(
    source: FinishedRun,
    towers: ClipTowers | None,
    calls: Mapping[str, Call] | None,
    format: PhoneFormat,
    points: int,
    min_miou: float | None,
    min_cosine: float | None,
) -> dict[str, Any]:
    if calls is None:
        return {"compared": False, "reason": format.reason}
    if towers is not None:
        return _compare_towers(source, towers, calls, min_cosine)
    figures = measure_sam(source, calls, points)
    limit = MIN_MIOU if min_miou is None else min_miou
    if not figures["miou"] >= limit:  # a NaN too
        raise UserError(
            f"export {format.name}: its masks have a mean IoU of {figures['miou']:.4f} with the PyTorch student's, "
            f"below min_miou={limit:g}; nothing was written; accept it with min_miou={max(0.0, figures['miou']):.2g}"
        )
    return figures


def _compare_towers(
    source: FinishedRun, towers: ClipTowers, calls: Mapping[str, Call], min_cosine: float | None
) -> dict[str, Any]:
    def one_by_one(name: str, rows: Tensor) -> np.ndarray:
        return np.concatenate([calls[name]([row[None]])[0].numpy() for row in rows])

    tokens = towers.tokenizer(list(clip_check.TEXTS)).numpy()
    return clip_check.compare(
        towers,
        lambda pixels: one_by_one("image", torch.from_numpy(pixels)),
        lambda tokens_NL: one_by_one("text", torch.from_numpy(tokens_NL).to(torch.int32)),
        checks.pictures(source.recipe, "validation", PICTURES),
        tokens,
        "fp32",
        min_cosine,
    )


def measure_sam(source: FinishedRun, calls: Mapping[str, Call], points: int) -> dict[str, Any]:
    """Return the IoU of the runtime's masks with those of the PyTorch student and segment_anything's own head."""
    head, errors, logit_errors, ious = source.head(), [], [], []
    for picture in checks.pictures(source.recipe, "validation", PICTURES):
        pixels, size = source.preprocess.prepare(picture)
        image = source.preprocess.normalize(pixels[None], torch.tensor([size]))
        with torch.no_grad():
            expected = source.student(image)["embedding"]
            (actual,) = calls["ImageEncoder"]([image])
            errors.append(checks.relative_error(actual.numpy(), expected.numpy()))
            for rows, own in _prompts(points, size):
                sparse, dense = calls["PromptEncoder"](rows)
                logits = calls["MaskDecoder"]([actual, sparse, dense])[0]
                reference = head.decode(expected[0], *own)[0]
                logit_errors.append(checks.relative_error(logits.numpy(), reference.numpy()))
                ious.extend(iou(pack(logits[0] > 0), pack(reference[0] > 0)))
    return {
        "pictures": len(errors),
        "masks": len(ious),
        "embedding_error": max(errors),
        "logits_error": max(logit_errors),
        "miou": float(np.mean(ious)),
        "lowest_iou": float(np.min(ious)),
    }


def _prompts(rows: int, size: tuple[int, int]) -> list[tuple[list[Tensor], tuple[Tensor | None, ...]]]:
    """Return clicks with their padding, and a box with clicks: as rows, and as the arguments of the head's `decode`."""
    h, w = size
    clicks = torch.tensor([[[w * (0.3 + 0.4 * i / rows), h * (0.6 - 0.3 * i / rows)] for i in range(rows - 1)]])
    labels = torch.ones(1, rows - 1, dtype=torch.int32)
    padded = [torch.cat([clicks, torch.zeros(1, 1, 2)], 1), torch.cat([labels, -labels[:, :1]], 1)]
    corners = torch.tensor([[[0.2 * w, 0.25 * h], [0.8 * w, 0.75 * h]]])
    inside, kinds = clicks[:, : rows - 2], labels[:, : rows - 2]
    boxed = [torch.cat([inside, corners], 1), torch.cat([kinds, torch.tensor([[2, 3]], dtype=torch.int32)], 1)]
    own = (inside, kinds, corners.view(1, 4)) if rows > 2 else (None, None, corners.view(1, 4))
    return [(padded, (clicks, labels)), (boxed, own)]
