"""Compare SAM's ONNX files with the PyTorch student and head: embeddings, logits and masks of many prompts."""

# Legend: N points, M masks, n the low resolution, H x W pixels for which masks are computed.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import PIXEL_MEAN, PIXEL_STD
from fmdistill.evaluate.masks import iou, pack
from fmdistill.export.checks import relative_error
from fmdistill.predict.sam_onnx import OnnxSamPredictor


@dataclass(frozen=True)
class CheckPrompt:
    """Points (N, 2) and labels (N,), a box (4,) or None, as shares of the image's width and height, and a mask."""

    points: np.ndarray
    labels: np.ndarray
    box: np.ndarray | None = None
    mask: bool = False


def prompts(seed: int, masks: bool = True) -> list[CheckPrompt]:
    """Return the check's prompts: 1 to 5 points, a box, a box with two points, and with `masks` a point and a mask."""
    drawn = np.random.default_rng(seed)
    made = []
    for count in range(1, 6):
        labels = np.ones(count)
        labels[2::2] = 0
        made.append(CheckPrompt(drawn.uniform(0.05, 0.95, (count, 2)), labels))
    corner = drawn.uniform(0.05, 0.5, 2)
    box = np.concatenate([corner, corner + drawn.uniform(0.2, 0.45, 2)])
    made.append(CheckPrompt(np.zeros((0, 2)), np.zeros(0), box))
    made.append(CheckPrompt(drawn.uniform(0.1, 0.9, (2, 2)), np.array([1.0, 0.0]), box))
    if masks:
        made.append(CheckPrompt(drawn.uniform(0.1, 0.9, (1, 2)), np.ones(1), mask=True))
    return made


def measure(
    predictor: OnnxSamPredictor, student: nn.Module, head: PromptHead, pictures: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Return the mean and lowest IoU of the files' masks with PyTorch's, and errors relative to PyTorch's norm.

    Every image is prepared as the layout's own programs do, black canvas included; both sides get the same pixels.
    """
    errors, logit_errors, ious, count = [], [], [], 0
    for number, picture in enumerate(pictures):
        given = predictor.encoder_input(picture)
        features = predictor.encode(given)
        size = predictor.layout.canvas or (picture.shape[0], picture.shape[1])
        with torch.inference_mode():
            embedding = student(_normalised(predictor, given))["embedding"]
            errors.append(relative_error(features["image_embeddings"], embedding.numpy()))
            for prompt in prompts(number, masks=not predictor.layout.batched):
                actual, expected = _both(predictor, features, head, embedding[0], prompt, size)
                logit_errors.append(relative_error(actual, expected))
                ious.extend(iou(pack(torch.from_numpy(actual > 0)), pack(torch.from_numpy(expected > 0))))
                count += 1
    return {
        "pictures": len(pictures),
        "prompts": count,
        "masks": len(ious),
        "embedding_error": max(errors),
        "logits_error": max(logit_errors),
        "miou": float(np.mean(ious)),
        "lowest_iou": float(np.min(ious)),
    }


def _normalised(predictor: OnnxSamPredictor, given: np.ndarray) -> Tensor:
    """Return the student's own input (1, 3, S, S) for an encoder's, by torch's resize and SAM's arithmetic."""
    if not predictor.layout.raw:
        return torch.from_numpy(given)
    side, frame = predictor.image_size, predictor.layout.frame or predictor.image_size
    image = torch.from_numpy(given).permute(2, 0, 1)[None]
    h, w = (int(length * side / frame + 0.5) for length in image.shape[-2:])
    if side != frame:
        image = nn.functional.interpolate(image, (h, w), mode="bilinear", antialias=True)
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
    padded = torch.zeros(1, 3, side, side)
    padded[..., :h, :w] = (image - mean) / std
    return padded


def _both(
    predictor: OnnxSamPredictor,
    features: dict[str, np.ndarray],
    head: PromptHead,
    embedding: Tensor,
    prompt: CheckPrompt,
    size: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the files' logits (M, H, W) and those of PyTorch's head for one prompt."""
    layout, side = predictor.layout, predictor.image_size
    h, w = predictor.preprocess.resized(*size)
    area = np.array([w, h])
    points, box = prompt.points * area, None if prompt.box is None else prompt.box.reshape(2, 2) * area
    pad = prompt.box is None or layout.single or layout.batched  # as predict adds it, or the graph
    corners = np.zeros((0, 2)) if box is None else box
    added = np.zeros((1 if pad and not layout.pads else 0, 2))
    tokens = np.concatenate([points, corners, added]) * ((layout.frame or side) / side)
    labels = np.concatenate([prompt.labels, [2.0, 3.0][: len(corners)], -np.ones(len(added))])

    own, kinds = np.concatenate([points, np.zeros((int(pad), 2))]), np.concatenate([prompt.labels, -np.ones(int(pad))])
    if box is None:  # the prompt encoder adds the padding itself
        own, kinds = points, prompt.labels
    pair = None if not len(own) else torch.from_numpy(own)[None].float(), torch.from_numpy(kinds)[None].float()
    boxes = None if box is None else torch.from_numpy(box.reshape(1, 4)).float()
    low = torch.from_numpy(_disc(4 * predictor.grid)) if prompt.mask else None
    sparse, dense, _ = head.encode_prompts(pair[0], pair[1], boxes, low)
    logits, scores = head.decode_batch(embedding[None], sparse, dense)
    side_given = layout.mask_side or 4 * predictor.grid
    given = None if low is None else _enlarged(low, side_given)
    _, _, actual = predictor.decode(features, tokens, labels, given, size)
    chosen = _choice(scores[0].numpy(), len(tokens)) if layout.single else slice(1 if layout.batched else 0, None)
    return actual, head.upsample(logits[:, chosen], (h, w), size)[0].numpy()


def _choice(scores: np.ndarray, points: int) -> slice:
    best = 0 if points >= 3 else 1 + int(np.argmax(scores[1:]))
    return slice(best, best + 1)


def _disc(low: int) -> np.ndarray:
    """Return logits (1, 1, n, n) of a disc, as an earlier mask."""
    y, x = np.mgrid[:low, :low] / low - 0.5
    return (8 - 60 * np.hypot(x, y)).astype(np.float32)[None, None]


def _enlarged(mask: Tensor, side: int) -> np.ndarray:
    if side % mask.shape[-1] == 0:
        return nn.functional.interpolate(mask, (side, side), mode="nearest").numpy()
    return nn.functional.interpolate(mask, (side, side), mode="bilinear").numpy()
