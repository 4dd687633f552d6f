"""Answer the prompts of one image round by round, each with one click more, and score every round's masks.

Letters: P prompts, M masks of a prompt, H x W pixels that are compared, n x n of the logits.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fmdistill import stop
from fmdistill.evaluate.clicks import Click, NextClick, largest_error, random_error
from fmdistill.evaluate.mask_choice import Resolution, binary, choose, valid_cells
from fmdistill.evaluate.masks import iou, pack
from fmdistill.evaluate.segmenters import ImageSegmenter

Select = Literal["single", "best_predicted", "oracle"]
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Answering:
    """How prompts are answered and continued: see `PromptedMiou`, whose settings these are."""

    clicks: tuple[int, ...] = (1,)
    next_click: NextClick = "largest_error"
    mask_input: bool = False
    select: Select = "best_predicted"
    resolution: Resolution = "original"
    seed: int = 0


@dataclass(frozen=True)
class Target:
    """An instance to prompt for: its box (x, y, x, y) or its first click, and the mask bool (H, W) to compare with."""

    number: int  # its place among the instances of its image
    area: float  # as stated, in pixels
    truth: np.ndarray
    box: tuple[float, float, float, float] | None = None
    first: Click | None = None


@dataclass
class _State:
    """A prompt between two rounds."""

    clicks: list[Click]
    iou: float = 0.0
    logits: Tensor | None = None  # (n, n) of its last mask
    mask: np.ndarray | None = None  # that mask, if another click is to be placed by it
    clicked: list[tuple[int, int]] = field(default_factory=list)  # pixels (x, y) of the mask
    open: bool = True  # False once no click is left to place


def scores(
    answering: Answering,
    segmenter: ImageSegmenter,
    targets: Sequence[Target],
    image: str,
    advance: Advance = lambda prompts: None,
) -> dict[int, np.ndarray]:
    """Return the IoU (P,) of the targets' masks by the number of clicks, for the numbers that are to be scored.

    All targets have a box, or all have a first click. A target whose mask is perfect gets no more clicks. `image` is
    the image's name, which random clicks depend on. `advance` is called with the number of prompts answered.
    """
    truths = [_compared(answering, segmenter, target.truth) for target in targets]
    packed = pack(torch.from_numpy(np.stack(truths)).to(segmenter.embedding.device))
    states = [_state(answering, segmenter, target) for target in targets]
    first, last, by_clicks = len(states[0].clicks), max(answering.clicks), {}
    for count in stop.between(range(first, last + 1)):
        if count > first:
            for state, target, truth in zip(states, targets, truths, strict=True):
                state.open = state.open and state.iou < 1
                if state.open:
                    _add_click(answering, segmenter, state, target, truth, image)
        active = [number for number, state in enumerate(states) if state.open]
        if active:
            chosen = packed[active], [states[number] for number in active], [targets[number].box for number in active]
            _answer(answering, segmenter, *chosen, keep=count < last and answering.next_click == "largest_error")
            advance(len(active))
        if count in answering.clicks:
            by_clicks[count] = np.array([state.iou for state in states])
    return by_clicks


def _answer(
    answering: Answering, segmenter: ImageSegmenter, packed: Any, states: list[_State], boxes: list[Any], keep: bool
) -> None:
    """Decode each state's prompt and store its mask, the best of several by IoU, in the state."""
    points = labels = masks = None
    if states[0].clicks:
        points = np.array([[(click.x, click.y) for click in state.clicks] for state in states])
        labels = np.array([[int(click.positive) for click in state.clicks] for state in states])
    if answering.mask_input and states[0].logits is not None:
        masks = torch.stack([state.logits for state in states if state.logits is not None])[:, None]
    prompt_boxes = None if boxes[0] is None else np.array(boxes)
    decoded = segmenter.decode(points, labels, prompt_boxes, masks, multimask=answering.select != "single")
    logits_PMnn = choose(*decoded, answering.select)
    per_prompt, place = logits_PMnn.shape[1], 0
    logits_Xnn, head = logits_PMnn.flatten(0, 1), segmenter.head
    for piece in binary(head, logits_Xnn, segmenter.original, segmenter.resized, answering.resolution):
        numbers = [(place + i) // per_prompt for i in range(len(piece))]
        for i, (number, value) in enumerate(zip(numbers, iou(packed[numbers], pack(piece)).tolist(), strict=True)):
            state = states[number]
            if (place + i) % per_prompt == 0 or value > state.iou:
                state.iou, state.logits = value, logits_Xnn[place + i]
                state.mask = piece[i].cpu().numpy() if keep else None
        place += len(piece)


def _add_click(
    answering: Answering, segmenter: ImageSegmenter, state: _State, target: Target, truth: np.ndarray, image: str
) -> None:
    """Append the next click to the state, or close it if none is left to place."""
    if answering.next_click == "random_error":
        assert state.logits is not None
        seeds = (answering.seed, zlib.crc32(image.encode()), target.number, len(state.clicks))
        click = random_error(segmenter, state.logits, target.truth, np.random.default_rng(seeds))
    else:
        assert state.mask is not None
        click = largest_error(state.mask, truth, state.clicked)
        if click is not None:
            state.clicked.append((int(click.x), int(click.y)))
            click = _in_image(answering, segmenter, click)
    state.open = click is not None
    if click is not None:
        state.clicks.append(click)


def _state(answering: Answering, segmenter: ImageSegmenter, target: Target) -> _State:
    if target.first is None:
        return _State([])
    scale_y, scale_x = _scale(answering, segmenter)
    return _State([target.first], clicked=[(int(target.first.x / scale_x), int(target.first.y / scale_y))])


def _compared(answering: Answering, segmenter: ImageSegmenter, truth_HW: np.ndarray) -> np.ndarray:
    """Return the truth at the resolution at which masks are compared: at `low`, the cells covered by more than half."""
    if answering.resolution == "original":
        return truth_HW
    rows, columns = valid_cells(segmenter.head, segmenter.resized)
    shares = segmenter.head.downsample(torch.from_numpy(truth_HW)[None], segmenter.resized)
    return (shares[0, 0, :rows, :columns] > 0).numpy()


def _in_image(answering: Answering, segmenter: ImageSegmenter, click: Click) -> Click:
    """Return a click on a pixel of the compared mask in pixels of the image: at `low`, on the centre of the cell."""
    scale_y, scale_x = _scale(answering, segmenter)
    return Click((click.x + 0.5) * scale_x - 0.5, (click.y + 0.5) * scale_y - 0.5, click.positive)


def _scale(answering: Answering, segmenter: ImageSegmenter) -> tuple[float, float]:
    """Return the (height, width) of a pixel of the compared mask in pixels of the image."""
    if answering.resolution == "original":
        return 1.0, 1.0
    cell = segmenter.head.config["image_size"] / (4 * segmenter.head.config["image_embedding_size"])
    (height, width), (h, w) = segmenter.original, segmenter.resized
    return cell * height / h, cell * width / w
