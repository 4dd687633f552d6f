"""Time the generated sources: is drawing an image faster than a training step on it?

Run: OMP_NUM_THREADS=1 python benchmarks/drawing.py [rounds=5]
Prints a markdown table of this process's CPU time per image, for drawing and for the forward and backward pass of the
network that trains on the source; the minimum over the rounds, in which both alternate.
"""

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from fmdistill import images
from fmdistill.mini.clip import clip_mini_student
from fmdistill.mini.labelled import sample_prompts
from fmdistill.mini.sam import sam_mini_student
from fmdistill.mini.scenes import decode_labels

COUNT = 16  # images per round


def spent(work: Callable[[], object]) -> float:
    """Return the CPU seconds of `work` per image, of which it processes `COUNT`."""
    start = time.process_time()
    work()
    return (time.process_time() - start) / COUNT


def drawn(settings: dict) -> Callable[[], object]:
    """Return a function that draws `COUNT` images of a source, new ones at each call."""
    source = images.build({**settings, "train": 100 * COUNT, "shard_size": COUNT}).source
    names = iter(source.shards()["train"])
    return lambda: list(source.read(next(names)))


def stepped(network: torch.nn.Module) -> Callable[[], object]:
    """Return a function that runs a forward and a backward pass on `COUNT` images."""
    side = network.image_size
    batch = torch.randn(COUNT, 3, side, side)  # type: ignore[call-overload]
    return lambda: network(batch)["embedding"].sum().backward()


def main() -> None:
    """Print one row per source."""
    rounds = int(dict(word.split("=", 1) for word in sys.argv[1:]).get("rounds", 5))
    scenes = images.build({"name": "scenes"}).source
    labels = decode_labels(next(iter(scenes.read(scenes.shards()["train"][0]))).extra["labels.png"])
    rng = np.random.default_rng(0)
    works = {
        "scenes, 256 px": (drawn({"name": "scenes"}), "sam_mini", stepped(sam_mini_student())),
        "prompts of a scene": (lambda: [sample_prompts(labels, rng, 6) for _ in range(COUNT)], "sam_mini", None),
        "captioned, 64 px": (drawn({"name": "captioned"}), "clip_mini", stepped(clip_mini_student())),
    }
    least: dict[str, float] = {}
    for _ in range(rounds + 1):  # the first round warms up
        for name, (draw, network, step) in works.items():
            least[name] = min(least.get(name, 9e9), spent(draw))
            if step is not None:
                least[network] = min(least.get(network, 9e9), spent(step))
    print("| drawn | ms | trained, forward and backward | ms | training over drawing |\n|---|---|---|---|---|")
    for name, (_, network, _) in works.items():
        draw, step = 1e3 * least[name], 1e3 * least[network]
        print(f"| {name} | {draw:.2f} | {network} | {step:.1f} | {step / draw:.1f} |")


if __name__ == "__main__":
    main()
