"""Evaluate three students and their teacher on 500 images, kill it with SIGKILL half way, and let it go on.

    OMP_NUM_THREADS=1 python benchmarks/evaluating.py [images=500]

sam_mini is the teacher of generated scenes of 128 px, cached first; the students are three sam_mini sized TinyViTs with
random weights. Prints the resident memory after a fifth of the images and at the end, how many images were judged when
it was killed and how many the second process began with, and whether its rows are those of an undisturbed evaluation.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fmdistill import cache, recipe
from fmdistill.evaluate import load
from fmdistill.evaluate.stored_results import Partial
from fmdistill.mini.tinyvit import tinyvit_sam_mini
from fmdistill.recipe import Recipe

SPAWN = multiprocessing.get_context("spawn")
RECIPE = """
out: {folder}/run
images: {{name: scenes, train: 1, validation: {images}, size: 128, seed: 5, objects: [2, 4]}}
teacher: {{name: sam_mini}}
cache: {{root: {folder}/cache, codec: fp16}}
student: {{name: tinyvit_sam_mini}}
task: {{name: distill}}
objective: {{embedding: {{output: embedding, distance: {{name: mse}}, weighting: {{name: uniform}}}}}}
optimizer: {{name: adamw}}
schedule: {{name: cosine}}
train: {{steps: 1}}
"""


def judge(folder: Path, name: str) -> None:
    """Evaluate with the partial results NAME.jsonl, and write the rows to NAME.json."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    students = {f"student {number}": tinyvit_sam_mini().eval() for number in range(3)}
    evaluator = load("eval/sa1b_clicks.yaml", {"truth": {"name": "labels"}, "clicks": [1, 2], "limit": None}).evaluator
    partial = Partial.open(folder / f"{name}.jsonl", {"of": "the same"})
    print(f"{name}: begins with {len(partial.done)} images", flush=True)
    rows, _ = evaluator.judge(opened(folder), students, partial)
    (folder / f"{name}.json").write_text(json.dumps(rows))


def opened(folder: Path) -> Recipe:
    """Return the recipe in the folder."""
    return recipe.load(folder / "scenes.yaml")


def follow(folder: Path, name: str, images: int, kill_at: int | None) -> dict[int, float]:
    """Run `judge` in a process of its own; return its resident MB by the number of judged images.

    It is killed after `kill_at` images.
    """
    process, memory = SPAWN.Process(target=judge, args=(folder, name)), {}
    process.start()
    while process.is_alive():
        done = lines(folder / f"{name}.jsonl") - 1
        if done >= 0 and (status := Path(f"/proc/{process.pid}/status")).is_file():
            for line in status.read_text().splitlines():
                if line.startswith("VmRSS"):
                    memory[done] = int(line.split()[1]) / 1024
        if kill_at is not None and done >= kill_at and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    process.join()
    return memory


def lines(path: Path) -> int:
    """Return the number of lines of a file, 0 without it."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def main() -> None:
    """Print what was measured."""
    images = int(dict(argument.split("=") for argument in sys.argv[1:]).get("images", 500))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "scenes.yaml").write_text(RECIPE.format(folder=folder, images=images))
        cache.run(opened(folder))
        memory = follow(folder, "whole", images, None)
        early = min(count for count in memory if count >= images / 5)
        print(
            f"resident: {memory[early]:.0f} MB after {early} images, {memory[max(memory)]:.0f} MB after {max(memory)}"
        )
        follow(folder, "killed", images, images // 2)
        print(f"killed after {lines(folder / 'killed.jsonl') - 1} images")
        follow(folder, "killed", images, None)
        results: list[Any] = [json.loads((folder / f"{each}.json").read_text()) for each in ("whole", "killed")]
        print(f"rows equal to those of the undisturbed evaluation: {results[0] == results[1]}, {len(results[0])} rows")


if __name__ == "__main__":
    main()
