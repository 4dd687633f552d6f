"""Time the masks of whole images against segment_anything's SamAutomaticMaskGenerator, and compare the masks.

    python benchmarks/everything.py [rounds=3] [full=true]

sam_mini as shipped on two photographs, with the default thresholds and with ones that half of the masks and all of them
pass; with `full=true` only a head of SAM's own size with random weights. Both run in this process with the same
threads, alternately. Prints a markdown table.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam

from fmdistill.backbones.promptable import PromptHead
from fmdistill.mini.photos import photograph
from fmdistill.mini.sam import build_sam_mini
from fmdistill.predict.everything import KnownEmbedding, MaskGenerator
from fmdistill.predict.sam import as_sam
from fmdistill.recipe import parse_overrides

Masks = list[dict[str, Any]]
SHARES = {"defaults": None, "half pass": 0.5, "all pass": 1.0}  # of the masks by predicted IoU
FULL = {
    "embed_dim": 256, "image_embedding_size": 64, "image_size": 1024, "mask_in_chans": 16, "transformer_depth": 2,
    "mlp_dim": 2048, "num_heads": 8, "iou_head_hidden_dim": 256, "iou_head_depth": 3, "num_multimask_outputs": 3,
}  # fmt: skip


def race(rounds: int, *works: Callable[[], Masks]) -> list[tuple[float, Masks]]:
    """Return each work's minimum CPU seconds over so many rounds, and its masks; they alternate."""
    results: list[Masks] = [[] for _ in works]
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for number, work in enumerate(works):
            start = time.process_time()
            results[number] = work()
            seconds[number].append(time.process_time() - start)
    return [(min(spent), masks) for spent, masks in zip(seconds, results, strict=True)]


def threshold(sam: Sam, pixels: np.ndarray, share: float) -> float:
    """Return a predicted IoU that this share of the masks of a 4x4 grid exceeds."""
    every = {"points_per_side": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    predicted = [mask["predicted_iou"] for mask in MaskGenerator(sam, **every).generate(pixels)]
    return float(np.quantile(predicted, 1 - share)) if share < 1 else 0.0


def compare(name: str, sam: Sam, pixels: np.ndarray, points: int, rounds: int) -> None:
    """Print one row for each share of masks that pass."""
    for label, share in SHARES.items():
        passing = {} if share is None else {"stability_score_thresh": 0.0}
        if share is not None:
            passing["pred_iou_thresh"] = threshold(sam, pixels, share)
        settings: dict[str, Any] = {"points_per_side": points, "output_mode": "coco_rle", **passing}
        (slow, expected), (fast, masks) = race(
            rounds,
            lambda settings=settings: SamAutomaticMaskGenerator(sam, **settings).generate(pixels),
            lambda settings=settings: MaskGenerator(sam, **settings).generate(pixels),
        )
        same = [mask["point_coords"] for mask in masks] == [mask["point_coords"] for mask in expected]
        equal = sum(own["segmentation"] == other["segmentation"] for own, other in zip(masks, expected, strict=False))
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        print(
            f"| {name}, {size}, {points}x{points} | {label} | {slow:.2f} | {fast:.2f} | {slow / fast:.1f} "
            f"| {len(masks)} | {'yes' if same else 'NO'} | {equal} |",
            flush=True,
        )


def full_sam() -> Sam:
    """Return a head of SAM's own size with random weights behind a fixed embedding, so that only the head is timed."""
    torch.manual_seed(0)
    head = PromptHead.from_config(FULL)
    with torch.no_grad():
        for name, parameter in head.mask_decoder.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
        dict(head.named_parameters())["mask_decoder.iou_prediction_head.layers.2.bias"].fill_(0.5)
    return as_sam(KnownEmbedding(torch.randn(256, 64, 64)), head)


def main(rounds: int = 3, full: bool = False) -> None:
    """Print the table."""
    print(f"{torch.get_num_threads()} thread(s), CPU seconds an image, least of {rounds}\n")
    print("| model, image, points | masks | segment_anything | fmdistill | ratio | n | same, in order | equal RLE |")
    print("|---|---|---|---|---|---|---|---|")
    if full:
        compare("SAM's head", full_sam(), photograph("coffee"), 8, rounds)
        return
    sam = build_sam_mini("packaged")
    for name in ("coffee", "chelsea"):
        compare("sam_mini", sam, photograph(name), 16, rounds)


if __name__ == "__main__":
    given = parse_overrides(sys.argv[1:])
    main(int(given.get("rounds", 3)), str(given.get("full", "")).lower() == "true")
