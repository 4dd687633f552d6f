"""Time the SAM teacher against a loop over SamPredictor.set_image, with random weights and images.

    OMP_NUM_THREADS=1 python benchmarks/teacher.py kind=vit_b images=1 rounds=3 json=teacher.json

All alternate in this process on the same images; prints a markdown table and whether the required ratios hold. On a CPU
with one thread, seconds are the process's CPU time.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from segment_anything import sam_model_registry

from fmdistill.backbones.device import has_bf16, pick_device
from fmdistill.backbones.throughput import encoder_flops, matmul_flops, predictor_pass, take_turns
from fmdistill.teachers.sam import SamTeacher

DEFAULTS = {"kind": "vit_b", "device": "auto", "images": "1", "rounds": "3", "json": ""}
LOOP = "SamPredictor loop, fp32"


def teacher_pass(teacher: SamTeacher, images: list[np.ndarray]) -> Callable[[], torch.Tensor]:
    """Return a function that embeds `images` batch by batch, as the cache stage does."""

    def run() -> torch.Tensor:
        embedding = torch.empty(0)
        for start in range(0, len(images), teacher.batch):
            batch = images[start : start + teacher.batch]
            pixels, sizes = zip(
                *(teacher.preprocess.prepare(PIL.Image.fromarray(image)) for image in batch), strict=True
            )
            embedding = teacher(torch.stack(pixels), torch.tensor(sizes))["embedding"]
        return embedding[-1:]

    return run


def main() -> None:
    """Print one row per method of running the encoder."""
    settings = {**DEFAULTS, **dict(argument.split("=", 1) for argument in sys.argv[1:])}
    device, count = pick_device(settings["device"], "device"), int(settings["images"])
    torch.manual_seed(0)
    sam = sam_model_registry[settings["kind"]]().eval().requires_grad_(False)
    for name, parameter in sam.image_encoder.named_parameters():
        if "pos" in name:  # zero at initialisation
            torch.nn.init.normal_(parameter, std=0.1)
    images = [np.random.default_rng(i).integers(0, 256, (682, 1024, 3), np.uint8) for i in range(count)]

    def build_teacher(dtype: str, exact: bool = False) -> SamTeacher:
        shape = {"batch": min(count, 4), "workers": 1, "device": str(device)}
        return SamTeacher(sam, name=settings["kind"], dtype=dtype, exact=exact, **shape)  # type: ignore[arg-type]

    # The fast teachers first: the exact one moves segment_anything's encoder to the device.
    fast, fast_bf16, exact = build_teacher("fp32"), build_teacher("bf16"), build_teacher("fp32", exact=True)
    works = {LOOP: lambda: predictor_pass(sam, images)}
    works |= {name: teacher_pass(teacher, images) for name, teacher in (("exact fp32", exact), ("fast fp32", fast))}
    works["fast bf16"] = teacher_pass(fast_bf16, images)
    sam.to(device)
    peaks = {name: matmul_flops(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    flops = encoder_flops(sam.image_encoder)
    seconds = take_turns(works, device, int(settings["rounds"]))
    rows = []
    for name, spent in seconds.items():
        peak = peaks["bfloat16" if "bf16" in name else "float32"]
        row = {"way": name, "images_per_second": count / spent, "ratio": seconds[LOOP] / spent}
        rows.append(row | {"share": flops * count / spent / peak})
    compiled = ", fast ones compiled" if fast.compiled else ""
    print(f"SAM {settings['kind']}, {flops / 1e12:.3f} TFLOP an image, {count} image(s), {device}, ", end="")
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}{compiled}; ", end="")
    print(f"matrix products {peaks['float32'] / 1e12:.3f} TFLOP/s in fp32, {peaks['bfloat16'] / 1e12:.3f} in bf16\n")
    print("| way | images/s | to the loop | share of matrix products |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['way']} | {row['images_per_second']:.4g} | {row['ratio']:.2f} | {100 * row['share']:.0f} % |")
    ratio = {row["way"]: row["ratio"] for row in rows}
    lines = {"fast fp32 is not slower than the loop": ratio["fast fp32"] >= 1}
    if has_bf16(device):
        lines["fast bf16 is at least 1.7 times the loop"] = ratio["fast bf16"] >= 1.7
    print("", *(f"{'holds' if holds else 'MISSED'}: {line}" for line, holds in lines.items()), sep="\n")
    if settings["json"]:
        figures = {"settings": settings, "flops": flops, "matmul_flops": peaks, "rows": rows, "lines": lines}
        Path(settings["json"]).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
