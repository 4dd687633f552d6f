"""Export the packaged sam_mini, or a TinyViT-5M at 1024 px with random weights, in every precision: size, masks, time.

    python benchmarks/exports.py [mini|5m] [repeats]

Times are the encoder's, the fastest call of each, on one thread and on two: all precisions and PyTorch in turn, and
torch.compile, if a C++ compiler is installed. With `5m`, `repeats` should be small: a call takes seconds.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fmdistill.backbones.sam import SamPreprocess
from fmdistill.export import checks, sam_onnx
from fmdistill.mini.sam import sam_mini_student
from fmdistill.predict import artefact
from fmdistill.predict.onnx_session import Session
from fmdistill.predict.sam_layouts import LAYOUTS

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import sam_exports  # noqa: E402  # networks with non-degenerate random weights

PRECISIONS = ("fp32", "fp16", "int8")


def networks(which: str) -> tuple:
    """The student and its head."""
    if which == "mini":
        student = sam_mini_student("packaged").eval()
        return student, student.head
    return sam_exports.full()


def compiled(student: torch.nn.Module, image: torch.Tensor) -> Any:
    """Return the student by torch.compile, compiled already for this number of threads; None without a C++ compiler."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return None
    torch.compiler.reset()
    network = torch.compile(student)
    with torch.inference_mode():
        network(image)
    return network


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
            if (compiler := compiled(student, image)) is not None:
                calls["torch.compile"] = lambda compiler=compiler: compiler(image)
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
