"""Measure one training step of the second stage at real size: TinyViT-5M at 1024 px, with the mask decoder of SAM.

    python benchmarks/refine.py [PROMPTS] [IMAGES] [ROUNDS]

16 prompts of 1 image with 1 round of corrections, random weights and embeddings; on a GPU in bf16, if there is one.
Prints seconds of the forward and the backward pass after a first step, processor time on a CPU, and the peak of memory
above that before the first step. Neither teacher nor cache is opened: the step needs cached embeddings and a decoder.
"""

import sys
import time
from typing import Any

import torch

from fmdistill.backbones.device import pick_device
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import SamPreprocess
from fmdistill.backbones.tinyvit import tinyvit_sam
from fmdistill.distill.objective import Objective
from fmdistill.distill.refine import Prompting, Refine
from fmdistill.pipeline.training_speed import begin_memory, peak_memory
from fmdistill.teachers.output import Output

HEAD = {
    "embed_dim": 256,
    "image_embedding_size": 64,
    "image_size": 1024,
    "mask_in_chans": 16,
    "transformer_depth": 2,
    "mlp_dim": 2048,
    "num_heads": 8,
    "iou_head_hidden_dim": 256,
    "iou_head_depth": 3,
    "num_multimask_outputs": 3,
}
TERM = {"output": "masks", "distance": {"name": "mask"}, "weighting": {"name": "uniform"}}


def clock(device: torch.device) -> float:
    """Return the processor time on a CPU, or the time at which a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def main(prompts: str = "16", images: str = "1", rounds: str = "1") -> None:
    """Print the figures of the second of two steps."""
    device, count = pick_device("auto", "device"), int(images)
    settings = Prompting(prompts=int(prompts), rounds=int(rounds))
    outputs = {"sam.embedding": Output((256, 64, 64), "image")}
    head = PromptHead.from_config(HEAD)
    task = Refine(tinyvit_sam(), Objective({"masks": TERM}), SamPreprocess(), outputs, head, settings).to(device)
    batch: Any = {
        "pixels": torch.randint(0, 256, (count, 3, 1024, 1024), dtype=torch.uint8, device=device),
        "sizes": torch.tensor([[768, 1024]] * count, device=device),
        "draws": torch.rand(count, settings.prompts, 4 + settings.rounds, device=device),
        "outputs": {"sam.embedding": torch.randn(count, 256, 64, 64, device=device)},
        "labels": torch.full((count,), -1, device=device),
        "label_values": [-1] * count,
        "keys": [str(number) for number in range(count)],
    }
    before = begin_memory(device)
    for step in range(2):
        start = clock(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = task(batch)["loss"]
        middle = clock(device)
        loss.backward()
        end = clock(device)
        print(f"step {step + 1}: forward {middle - start:.2f} s, backward {end - middle:.2f} s", flush=True)
    print(f"{device}: {settings.prompts} prompts, {count} images, {settings.rounds} rounds: ", end="")
    print(f"{(peak_memory(device) - before) / 1e9:.2f} GB above the start")


if __name__ == "__main__":
    main(*sys.argv[1:])
