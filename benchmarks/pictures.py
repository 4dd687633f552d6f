"""Draw the pictures of the docs: sam_mini's masks at 24 points of photographs, and students' beside their teacher's.

    python benchmarks/pictures.py docs/pictures/sam_mini_prompts.png
    python benchmarks/pictures.py docs/pictures/teacher_and_student.png runs/demo/sam_mse runs/demo/sam_srw

The photographs are those of the source `photos` for validation, on which nothing was trained, and are shown whole.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from torch import nn

from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import SamPreprocess
from fmdistill.distill.student import load_student
from fmdistill.evaluate.subjects import embed
from fmdistill.mini.photos import PHOTOGRAPHS, photograph
from fmdistill.mini.sam import sam_mini_student

COLOURS = ((37, 99, 235), (234, 88, 12), (22, 163, 74), (190, 24, 93), (202, 138, 4), (109, 40, 217))
SIDE = 384  # pixels: the photographs' long side
# Shares of width and height: six points of each photograph, and three of those on which students are shown.
SIX = ((0.2, 0.25), (0.5, 0.3), (0.8, 0.25), (0.25, 0.7), (0.55, 0.65), (0.8, 0.8))
THREE = {"chelsea": (0.5, 0.35), "coffee": (0.52, 0.35), "flower": (0.55, 0.45)}

Segment = Callable[[np.ndarray, tuple[float, float]], np.ndarray]


def main(out: str, *runs: str) -> None:
    """Write the picture of sam_mini alone, or beside the students of `runs`."""
    teacher = sam_mini_student("packaged").eval()
    head, preprocess = teacher.head, teacher.preprocess
    figure = students(runs, head, preprocess, teacher.encoder) if runs else prompts(head, preprocess, teacher.encoder)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90, bbox_inches="tight", pad_inches=0.05)
    print(out)


def prompts(head: PromptHead, preprocess: SamPreprocess, encoder: nn.Module) -> Figure:
    """Draw a row for each photograph and a column for each point."""
    answer = segmenter(Encoder(encoder), head, preprocess)
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    for row, name in zip(figure.subplots(4, len(SIX)), PHOTOGRAPHS["validation"], strict=True):
        for axis, place, colour in zip(row, SIX, COLOURS, strict=True):
            draw(axis, whole(name), place, answer(whole(name), place), colour)
    return figure


def students(runs: tuple[str, ...], head: PromptHead, preprocess: SamPreprocess, encoder: nn.Module) -> Figure:
    """Draw a row for each photograph: the teacher's mask and each student's, all by the teacher's decoder."""
    models: Mapping[str, nn.Module] = {
        "teacher: sam_mini": Encoder(encoder),
        **{f"student: {Path(run).name}": load_student(run).eval() for run in runs},
    }
    figure = Figure(figsize=(3.4 * len(models), 7.2), layout="constrained")
    axes = figure.subplots(len(THREE), len(models))
    for axis, title in zip(axes[0], models, strict=True):
        axis.set_title(title, fontsize=11)
    for row, (name, place) in zip(axes, THREE.items(), strict=True):
        for axis, model in zip(row, models.values(), strict=True):
            draw(axis, whole(name), place, segmenter(model, head, preprocess)(whole(name), place), COLOURS[0])
    return figure


class Encoder(nn.Module):
    """An image encoder that returns its output by name, as students do."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"embedding": (B, C, g, g)}."""
        return {"embedding": self.encoder(image)}


def segmenter(model: nn.Module, head: PromptHead, preprocess: SamPreprocess) -> Segment:
    """Return a function from a photograph (H, W, 3) and a point to the mask of highest predicted IoU, bool (H, W)."""

    @torch.inference_mode()
    def segment(pixels: np.ndarray, place: tuple[float, float]) -> np.ndarray:
        prepared, (h, w) = preprocess.prepare(pixels)
        (embedding,) = embed(model, preprocess, prepared[None], torch.tensor([[h, w]]))
        point = torch.tensor([[[place[0] * w, place[1] * h]]])
        logits, predicted = head.decode(embedding, point, torch.ones(1, 1, dtype=torch.int), multimask=True)
        best = logits[:, int(predicted[0].argmax())][None]
        return (head.upsample(best, (h, w), pixels.shape[:2])[0, 0] > 0).numpy()

    return segment


def whole(name: str) -> np.ndarray:
    """Return a photograph uint8 (H, W, 3) at the pictures' size."""
    image = PIL.Image.fromarray(photograph(name))
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)


def draw(
    axis: object, pixels: np.ndarray, place: tuple[float, float], mask: np.ndarray, colour: tuple[int, int, int]
) -> None:
    """Draw the photograph, the mask in colour and the point."""
    painted = pixels.astype(float)
    painted[mask] = 0.45 * painted[mask] + 0.55 * np.array(colour)
    axis.imshow(painted.round().astype(np.uint8))  # type: ignore[attr-defined]
    point = (place[0] * pixels.shape[1], place[1] * pixels.shape[0])
    axis.plot(*point, "o", markersize=6, color="white", markeredgecolor="black")  # type: ignore[attr-defined]
    axis.set_axis_off()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(*sys.argv[1:])
