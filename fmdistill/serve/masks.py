"""Predict the masks of a prompt from each network's embedding, by the teacher's or its own decoder; compare them."""

# Legend: K points, M masks, n the low resolution, H x W pixels of the picture that the page shows.

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmdistill.backbones.promptable import PromptHead
from fmdistill.evaluate.masks import iou, pack
from fmdistill.evaluate.results import TEACHER
from fmdistill.registry import UserError
from fmdistill.serve.pictures import OpenImage
from fmdistill.serve.subjects import OpenedRuns, synchronize

CHOICES = ("auto", "0", "1", "2", "3")
MOST_POINTS = 64


@dataclass(frozen=True)
class MaskPrompt:
    """Points and a box on the picture as shares of its width and height, from 0 to 1, and the mask to choose.

    `choice` is the number of SAM's mask: 0 is the one for prompts that leave no doubt, 1 to 3 are those for one point;
    "auto" is the one of 1 to 3 with the highest predicted IoU for a single point, and 0 for any other prompt.
    """

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()  # 1 foreground, 0 background
    box: tuple[float, float, float, float] | None = None  # left, top, right, bottom
    choice: str = "auto"

    @classmethod
    def from_json(cls, stated: Any) -> "MaskPrompt":
        """Return the prompt of a request, {"points": [[x, y, label]], "box": [4 numbers], "mask": choice}.

        Raises UserError if it is none.
        """
        if not isinstance(stated, Mapping):
            raise UserError(f"prompt {stated!r}: expected an object with points, box and mask")
        points, box = stated.get("points") or [], stated.get("box")
        if not isinstance(points, list) or len(points) > MOST_POINTS:
            raise UserError(f"points: expected a list of at most {MOST_POINTS}, [x, y, label] each")
        rows = [_shares(point, 3, "points") for point in points]
        labels = tuple(int(row[2]) for row in rows)
        corners = None if box is None else _shares(box, 4, "box")
        choice = str(stated.get("mask", "auto"))
        if not rows and corners is None:
            raise UserError("prompt: neither a point nor a box; give one")
        if any(row[2] not in (0, 1) for row in rows):
            raise UserError(f"points={points}: the third number is the label, 1 or 0")
        if choice not in CHOICES:
            raise UserError(f"mask={choice}: expected one of {', '.join(CHOICES)}")
        if corners is not None:
            (left, right), (top, bottom) = sorted(corners[0::2]), sorted(corners[1::2])
            corners = (left, top, right, bottom)
        return cls(tuple((row[0], row[1]) for row in rows), labels, corners, choice)


@dataclass(frozen=True)
class Prediction:
    """One network's mask, bool (H, W), the IoU that it predicts, its number, and its milliseconds."""

    mask_HW: np.ndarray
    predicted: float
    number: int
    milliseconds: float


@torch.inference_mode()
def predict(
    opened: OpenedRuns, image: OpenImage, embedding: Tensor, prompt: MaskPrompt, own: PromptHead | None = None
) -> Prediction:
    """Return the mask of `prompt` from an embedding (C, g, g) of the image, by the teacher's head or the `own` one."""
    head = own or opened.head
    start = time.perf_counter()
    resized = int(image.sizes[0, 0]), int(image.sizes[0, 1])
    arguments = tensors(prompt, resized, opened.device)
    logits_1Mnn, predicted_1M = head.decode_all(embedding, *arguments)
    number = choose(predicted_1M[0], prompt)
    logits_HW = head.upsample(logits_1Mnn[:, number : number + 1], resized, image.shown)[0, 0]
    mask_HW = (logits_HW > 0).cpu().numpy()
    synchronize(opened.device)
    return Prediction(mask_HW, float(predicted_1M[0, number]), number, 1000 * (time.perf_counter() - start))


def tensors(
    prompt: MaskPrompt, resized: tuple[int, int], device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return points (1, K, 2), labels (1, K) and box (1, 4) in pixels of the resized image (h, w), None without any."""
    h, w = resized
    points = torch.tensor([[(x * w, y * h) for x, y in prompt.points]], device=device) if prompt.points else None
    labels = torch.tensor([prompt.labels], device=device) if prompt.points else None
    if prompt.box is None:
        return points, labels, None
    left, top, right, bottom = prompt.box
    return points, labels, torch.tensor([[left * w, top * h, right * w, bottom * h]], device=device)


def choose(predicted_M: Tensor, prompt: MaskPrompt) -> int:
    """Return the number of the mask to show, given the predicted IoU of masks 0 to 3."""
    if prompt.choice != "auto":
        return min(int(prompt.choice), len(predicted_M) - 1)
    if prompt.box is None and len(prompt.points) == 1 and len(predicted_M) > 1:
        return 1 + int(predicted_M[1:].argmax())
    return 0


def compare(predictions: Mapping[str, Prediction]) -> list[dict[str, Any]]:
    """Return a JSON entry for each network: its mask as runs, its times, and its IoU with the teacher's mask."""
    packed = {name: pack(torch.from_numpy(each.mask_HW)[None]) for name, each in predictions.items()}
    return [
        {
            "subject": name,
            "runs": runs(each.mask_HW),
            "number": each.number,
            "predicted": round(each.predicted, 4),
            "milliseconds": round(each.milliseconds, 2),
            "iou": None if TEACHER not in packed else float(iou(packed[TEACHER], packed[name])[0]),
        }
        for name, each in predictions.items()
    ]


def runs(mask_HW: np.ndarray) -> list[int]:
    """Return the lengths of the runs of equal pixels, row by row; the first is of pixels outside, and may be 0."""
    flat = mask_HW.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths


def _shares(values: Any, count: int, what: str) -> tuple[Any, ...]:
    numbers = isinstance(values, list) and len(values) == count
    if not numbers or not all(isinstance(v, int | float) and math.isfinite(v) and 0 <= v <= 1 for v in values):
        raise UserError(f"{what}={values!r}: expected {count} numbers from 0 to 1")
    return tuple(float(v) for v in values)
