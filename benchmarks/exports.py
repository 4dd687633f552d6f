"""Export the packaged sam_mini, or a TinyViT-5M with random weights, in every precision: size, masks, time.

    python benchmarks/exports.py [mini|5m] [repeats]

Times are the encoder's, the fastest call of each, all precisions and PyTorch in turn, on one thread and on two.
"""

import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import SamPreprocess
from fmdistill.backbones.tinyvit import tinyvit_sam
from fmdistill.export import checks, sam_onnx
from fmdistill.mini.sam import sam_mini_student
from fmdistill.predict import artefact
from fmdistill.predict.onnx_session import Session
from fmdistill.predict.sam_layouts import LAYOUTS

FULL = {
    "embed_dim": 256, "image_embedding_size": 64, "image_size": 1024, "mask_in_chans": 16, "transformer_depth": 2,
    "mlp_dim": 2048, "num_heads": 8, "iou_head_hidden_dim": 256, "iou_head_depth": 3, "num_multimask_outputs": 3,
}  # fmt: skip
PRECISIONS = ("fp32", "fp16", "int8")


def networks(which: str) -> tuple:
    """The student and its head."""
    if which == "mini":
        student = sam_mini_student("packaged").eval()
        return student, student.head
    torch.manual_seed(0)
    return tinyvit_sam("5m").eval(), PromptHead.from_config(FULL).eval()


def main(which: str = "mini", repeats: str = "20") -> None:
    """Print one row for each precision."""
    student, head = networks(which)
    photographs = checks.photographs()
    recipe: Any = SimpleNamespace(images={"name": "photos", "train": 16})  # for calibration, of other photographs

    def pictures(split: str, count: int) -> list:
        return photographs[:count] if split == "validation" else checks.pictures(recipe, split, count)

    side = head.config["image_size"]
    pixels, size = SamPreprocess(side).prepare(photographs[0])
    image = SamPreprocess(side).normalize(pixels[None], torch.tensor([size]))
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            export = sam_onnx.SamExport(student, head, "onnx", LAYOUTS["onnx"], pictures, {})
            out = sam_onnx.write(export, Path(folder) / precision, precision, 0.0)
            check = artefact.read(out).check
            sizes = [(out / f"{name}.onnx").stat().st_size / 1e6 for name in ("encoder", "decoder")]
            figures = f"mIoU {check['miou']:.4f} | embedding's error {check['embedding_error']:.1e}"
            print(f"{precision} | {sizes[0]:.2f} + {sizes[1]:.2f} MB | {figures}", flush=True)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            calls = {"PyTorch eager": lambda: student(image)}
            for precision in PRECISIONS:
                session = Session(Path(folder) / precision / "encoder.onnx", threads)
                calls[precision] = lambda session=session: session({"x": image.numpy()})
            best = dict.fromkeys(calls, float("inf"))
            with torch.inference_mode():
                for _ in range(int(repeats)):
                    for name, call in calls.items():
                        start = time.perf_counter()
                        call()
                        best[name] = min(best[name], time.perf_counter() - start)
            print(f"{threads} threads, ms |", " | ".join(f"{name} {1000 * value:.1f}" for name, value in best.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
