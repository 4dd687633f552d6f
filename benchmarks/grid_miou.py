"""Time grid_miou against a loop over segment_anything's SamPredictor, on a model of sam_mini's shape.

    python benchmarks/grid_miou.py

Uses sam_mini's weights, random embeddings and 480x640 images; both run in this process with the same threads. Prints a
markdown table.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from fmdistill.backbones.promptable import PromptHead
from fmdistill.evaluate.grid_miou import GridMiou, image_iou
from fmdistill.mini.sam import build_sam_mini

ORIGINAL, RESIZED, K, REPEATS = (480, 640), (192, 256), 8, 7
MODES = ("single", "best_predicted", "paired", "oracle")


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the IoU of two bool masks; empty against empty is 1."""
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 1.0


def loop(sam: Sam, teacher: torch.Tensor, student: torch.Tensor, protocol: GridMiou) -> np.ndarray:
    """Return each point's IoU, computed with one `SamPredictor.predict` per point and embedding."""
    predictors = []
    for embedding in (teacher, student):
        predictor = SamPredictor(sam)
        predictor.features, predictor.is_image_set = embedding[None], True
        predictor.original_size, predictor.input_size = ORIGINAL, RESIZED
        predictors.append(predictor)
    scores, cells = [], np.ceil(np.array(RESIZED) * 4 * teacher.shape[-1] / sam.image_encoder.img_size).astype(int)
    for y in (np.arange(K) + 0.5) / K * ORIGINAL[0]:
        for x in (np.arange(K) + 0.5) / K * ORIGINAL[1]:
            predictions = []
            for predictor in predictors:
                masks, predicted, low = predictor.predict(
                    np.array([[x, y]]), np.array([1]), multimask_output=protocol.select != "single"
                )
                masks = low[:, : cells[0], : cells[1]] > 0 if protocol.resolution == "low" else masks
                predictions.append((masks, predicted))
            (t, t_iou), (s, s_iou) = predictions
            if protocol.select == "paired":
                scores.append(np.mean([iou(a, b) for a, b in zip(t, s, strict=True)]))
            elif protocol.select == "oracle":
                scores.append(max(iou(t[t_iou.argmax()], b) for b in s))
            else:
                scores.append(iou(t[t_iou.argmax()], s[s_iou.argmax()]))
    return np.array(scores)


def race(*works: Callable[[], np.ndarray]) -> list[tuple[float, np.ndarray]]:
    """Return each work's minimum seconds over REPEATS runs, and its result; they alternate, so that all share noise."""
    results, seconds = [work() for work in works], [[] for _ in works]
    for _ in range(REPEATS):
        for work, spent in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            spent.append(time.perf_counter() - start)
    return [(min(spent), result) for spent, result in zip(seconds, results, strict=True)]


def main() -> None:
    """Print one row per mode and resolution."""
    sam = build_sam_mini("packaged")
    head = PromptHead.from_sam(sam)
    torch.manual_seed(0)
    teacher = torch.randn(128, 16, 16)
    student = teacher + 0.3 * torch.randn(128, 16, 16)
    print(f"{K * K} points, {ORIGINAL[0]}x{ORIGINAL[1]}, {torch.get_num_threads()} thread(s), ms per point and pair\n")
    print("| resolution | select | SamPredictor loop | grid_miou | ratio | difference |\n|---|---|---|---|---|---|")
    for resolution in ("original", "low"):
        for select in MODES:
            protocol = GridMiou(select=select, resolution=resolution)
            (slow, expected), (fast, measured) = race(
                lambda p=protocol: loop(sam, teacher, student, p),
                lambda p=protocol: image_iou(head, teacher, student, ORIGINAL, RESIZED, K, p),
            )
            per_point = 1000 / (K * K)
            print(
                f"| {resolution} | {select} | {slow * per_point:.2f} | {fast * per_point:.2f} "
                f"| {slow / fast:.1f} | {abs(measured.mean() - expected.mean()):.0e} |"
            )


if __name__ == "__main__":
    main()
