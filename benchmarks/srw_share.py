"""Measure SRW's share of a training step of the full-size student: TinyViT-5M, 1024 px, 64x64x256 embeddings.

Run: OMP_NUM_THREADS=2 python benchmarks/srw_share.py
The two objectives alternate in one process on the same batch; prints the minimum over several rounds of each part.
"""

import time

import torch

from fmdistill.backbones.sam import SamPreprocess
from fmdistill.backbones.tinyvit import tinyvit_sam
from fmdistill.distill.objective import Objective
from fmdistill.distill.seen import Seen
from fmdistill.distill.tasks import Distill
from fmdistill.teachers.output import Output

ROUNDS = 5


def objective(name: str) -> Objective:
    """Return the recipes' objective with the weighting `name`."""
    return Objective({"embedding": {"distance": {"name": "mse"}, "weighting": {"name": name}}})


def least(function, rounds: int = ROUNDS) -> float:
    """Return the minimum seconds of several calls."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print the time of a step, and SRW's share of it."""
    torch.manual_seed(0)
    preprocess = SamPreprocess()
    sizes = torch.tensor([[683, 1024]])
    batch = {
        "pixels": torch.randint(0, 256, (1, 3, 1024, 1024), dtype=torch.uint8),
        "sizes": sizes,
        "outputs": {"sam.embedding": torch.randn(1, 256, 64, 64)},
    }
    student = tinyvit_sam()
    tasks = {
        name: Distill(student, objective(name), preprocess, {"sam.embedding": Output((256, 64, 64), "image")})
        for name in ("uniform", "srw")
    }
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4)

    def step(name: str) -> None:
        tasks[name](batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = {name: float("inf") for name in tasks}
    for _ in range(ROUNDS):
        for name in tasks:
            steps[name] = min(steps[name], least(lambda name=name: step(name), 1))
    outputs = {"student.embedding": torch.randn(1, 256, 64, 64, requires_grad=True), **batch["outputs"]}
    seen = Seen(outputs, grids={"sam.embedding": preprocess.valid(sizes).flatten(1)})
    alone = {}
    for name, task in tasks.items():
        alone[name] = least(lambda task=task: task.objective(seen)[0]["embedding"].backward(), 50)
    added = alone["srw"] - alone["uniform"]
    print(f"training step of one image: uniform {steps['uniform']:.3f} s, srw {steps['srw']:.3f} s")
    print(f"objective alone: uniform {alone['uniform'] * 1e3:.2f} ms, srw {alone['srw'] * 1e3:.2f} ms")
    print(f"SRW adds {added * 1e3:.2f} ms, {100 * added / steps['uniform']:.3f} % of the step")


if __name__ == "__main__":
    main()
