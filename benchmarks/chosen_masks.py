"""Measure how much of a SAM student's error is the choice of the mask, and how much the mask itself.

    python benchmarks/chosen_masks.py RUN [POINTS]

POINTS x POINTS points (8) on each of the run's validation images, masks 1 to 3 at the decoder's low resolution. The
teacher's mask of highest predicted IoU is the wanted one. Prints the student's mean IoU with it of three masks: the one
that the student's predicted IoU chooses, the one of the same token as the wanted mask, and the best of the three; for
all points and by the share of the image that the wanted mask covers.
"""

import sys
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from fmdistill import recipe
from fmdistill.distill.student import load_student
from fmdistill.evaluate.grid_miou import grid_points
from fmdistill.evaluate.segmenters import TEACHER, Segmenters

SHARES = (0.003, 0.01, 0.03, 0.1)


def bucket(share: float) -> str:
    """Return the name of the bucket of a mask that covers this share of the image."""
    bounds = (0.0, *SHARES, 1.0)
    number = int(np.searchsorted(SHARES, share, side="right"))
    return f"{100 * bounds[number]:g} to {100 * bounds[number + 1]:g} %"


def iou(masks_PMnn: Tensor, wanted_Pnn: Tensor) -> Tensor:
    """Return the IoU (P, M) of masks with the wanted one; two empty masks have 1."""
    both = (masks_PMnn & wanted_Pnn[:, None]).sum((2, 3))
    either = (masks_PMnn | wanted_Pnn[:, None]).sum((2, 3))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def main(run: str, points: str = "8") -> None:
    """Print one row for each bucket."""
    settings = recipe.load_saved(run)
    opened = Segmenters.open(settings, {"student": load_student(run)})
    rows, gaps = defaultdict(list), []
    for image in opened.images():
        xy_P12 = grid_points(int(points), image.original)[:, None]
        label_P1 = np.ones(xy_P12.shape[:2])
        answers = {name: segmenter.decode(xy_P12, label_P1) for name, segmenter in image.segmenters.items()}
        (wanted_PMnn, teacher_PM), (student_PMnn, student_PM) = answers[TEACHER], answers["student"]
        step = opened.subjects[TEACHER].preprocess.image_size / wanted_PMnn.shape[-1]
        height, width = (round(side / step) for side in image.segmenters[TEACHER].resized)
        all_P, token_P, chosen_P = torch.arange(len(xy_P12)), teacher_PM.argmax(1), student_PM.argmax(1)
        wanted_Pnn = wanted_PMnn[all_P, token_P, :height, :width] > 0
        iou_PM = iou(student_PMnn[..., :height, :width] > 0, wanted_Pnn)
        best, second, _ = teacher_PM.sort(1, descending=True).values.unbind(1)
        gaps += (best - second).tolist()
        for point in all_P:
            row = [iou_PM[point, chosen_P[point]], iou_PM[point, token_P[point]], iou_PM[point].max()]
            row += [chosen_P[point] == token_P[point]]
            for name in ("all", bucket(float(wanted_Pnn[point].float().mean()))):
                rows[name].append([float(value) for value in row])
    print("| wanted mask | points | chosen | same token | best of three | same choice |\n|---|---|---|---|---|---|")
    for name in sorted(rows, key=lambda name: -1.0 if name == "all" else float(name.split()[0])):
        values = 100 * np.mean(rows[name], axis=0)
        print(f"| {name} | {len(rows[name])} | " + " | ".join(f"{value:.2f}" for value in values[:3]), end="")
        print(f" | {values[3]:.1f} % |")
    print(f"The teacher's best and second predicted IoU differ by {np.median(gaps):.3f} in the median.")


if __name__ == "__main__":
    main(*sys.argv[1:])
