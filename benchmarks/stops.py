"""Send SIGINT or SIGTERM at random moments to every long verb, and check its message, exit status and leftover files.

Run: OMP_NUM_THREADS=1 python benchmarks/stops.py [cache=40 distill=40 evaluate=40 bench=25 compare=30 ray=25] [seed=0]
Each signal is sent to a child that runs the command line, forked from this process, which has imported torch and never
computed with it. The child must exit with 130 or 143 and one line, or with 0 if it had finished. After a few signals to
runs in the same folder, the verb is completed undisturbed and its outcome compared with an undisturbed run's: shards
byte for byte, the student's weights and the rows of an evaluation value for value.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kills import RECIPE
from torch import nn

from fmdistill.cli import main as command_line

FORK = multiprocessing.get_context("fork")
PER_FOLDER = 4  # signals before the verb is completed and its outcome compared
LINE = "fmdistill: stopped; the same command continues where it stopped"
GRID = "name: grid_miou\ngrids: [3]\nfloors: true\ndevice: cpu\n"
TRAINING = """
objective:
  embedding: {{distance: {{name: mse}}, weighting: {{name: srw, temperature: 0.5}}}}
optimizer: {{name: adamw, lr: 0.003}}
train: {{steps: 60, batch_size: 8, workers: 1, window: 2, precision: fp32, log_every: 10, validate_every: 20,
  checkpoint_every: 25, device: cpu, ema: 0.9}}
protocols: [{folder}/grid.yaml]
"""


class Student(nn.Module):
    """A few convolutions and a BatchNorm: enough state for a checkpoint to lose."""

    image_size, out_channels = 64, 32

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 8, 8), nn.BatchNorm2d(16), nn.GELU(), nn.Conv2d(16, 32, 3, 2, padding=1)
        )

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"embedding": (B, 32, 4, 4)}."""
        return {"embedding": self.net(image)}


@dataclass(frozen=True)
class Verb:
    """A command line for a folder, the verbs that must have run before it, and a function that reads its outcome."""

    arguments: Callable[[Path], list[str]]
    before: tuple[str, ...]  # verbs
    outcome: Callable[[Path], Any]


def recipe(folder: Path) -> str:
    """Write the toy recipes and the protocol into `folder`; return the first recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    base = RECIPE.replace("{{name: tinyvit_sam}}", '{{name: "stops:Student"}}')
    base = "".join(line + "\n" for line in base.splitlines() if not line.startswith(("optimizer", "train")))
    (folder / "grid.yaml").write_text(GRID)
    (folder / "toy.yaml").write_text((base + TRAINING).format(folder=folder))
    (folder / "other.yaml").write_text(f"extends: {folder}/toy.yaml\nout: {folder}/other\noptimizer: {{lr: 0.001}}\n")
    return str(folder / "toy.yaml")


def shards(folder: Path) -> dict[str, bytes]:
    """Return the files of the cache, without the recipe, which contains the folder's path."""
    return {p.name: p.read_bytes() for p in sorted((folder / "cache").iterdir()) if p.name != "recipe.yaml"}


def trained(folder: Path) -> Any:
    """Return the student's weights and the logged steps and losses."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    losses = [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]
    return (folder / "run/student.safetensors").read_bytes(), losses


def judged(folder: Path, run: str = "run") -> Any:
    """Return the rows of the evaluation and the scores of its images."""
    stored = json.loads((folder / run / "evaluation/grid.json").read_text())
    return stored["rows"], stored["images"]


VERBS = {
    "cache": Verb(lambda folder: ["cache", recipe(folder)], (), shards),
    "distill": Verb(lambda folder: ["distill", recipe(folder)], ("cache",), trained),
    "evaluate": Verb(lambda folder: ["evaluate", recipe(folder)], ("cache", "distill"), judged),
    "bench": Verb(
        lambda folder: ["bench", recipe(folder), "bench.rounds=3", "bench.images=2", "bench.megabytes=0.5"],
        (),
        lambda folder: sorted(json.loads((folder / "run/bench.json").read_text())),
    ),
    "compare": Verb(
        lambda folder: ["compare", recipe(folder), str(folder / "other.yaml"), "--seeds", "1", "train.steps=20"],
        ("cache",),
        lambda folder: [judged(folder, "run/seed-0"), judged(folder, "other/seed-0")],
    ),
    "ray": Verb(
        lambda folder: [
            "cache", recipe(folder), "cache.executor={name: ray, address: local, actors: 1}"
        ],  # fmt: skip
        (),
        shards,
    ),
}  # fmt: skip


def start(name: str, folder: Path) -> multiprocessing.Process:
    """Start the verb in a forked child whose standard error goes to `folder`.log."""
    arguments = VERBS[name].arguments(folder)

    def work() -> None:
        os.setsid()
        for number, place in ((1, os.devnull), (2, f"{folder}.log")):
            os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        torch.set_num_threads(1)
        code = command_line(arguments)
        sys.exit(code)

    process = FORK.Process(target=work)
    process.start()
    return process


def left_over(folder: Path) -> list[str]:
    """Return the temporary files in the folder, which no verb may leave behind."""
    ends, begins = (".tmp", ".part"), ".fmdistill-bench-"
    return [str(path) for path in folder.rglob("*") if path.name.endswith(ends) or path.name.startswith(begins)]


def complete(name: str, folder: Path) -> float:
    """Run the verb undisturbed; return its seconds."""
    began = time.monotonic()
    process = start(name, folder)
    process.join(300)
    log = Path(f"{folder}.log").read_text()
    assert process.exitcode == 0, f"{name} ended with {process.exitcode}:\n{log}"
    return time.monotonic() - began


def strike(name: str, folder: Path, rng: random.Random, whole: float) -> str:
    """Send one signal at a random moment; return how the verb ended. Raises AssertionError if it ended wrongly."""
    number = rng.choice([signal.SIGINT, signal.SIGTERM])
    process = start(name, folder)
    time.sleep(rng.uniform(0.02, whole))
    if process.is_alive():  # sent to all its processes, as by a terminal or a scheduler; with Ray only to the driver
        (os.kill if name == "ray" else os.killpg)(process.pid or 0, number)
    process.join(60)
    log = Path(f"{folder}.log").read_text()
    assert process.exitcode is not None, f"{name}: still running a minute after signal {number}\n{log}"
    assert process.exitcode in (0, 128 + number), f"{name}: {process.exitcode} by signal {number}\n{log}"
    assert "Traceback" not in log and "Exception ignored" not in log, f"{name}, signal {number}:\n{log}"
    if process.exitcode:
        assert log.splitlines()[-1] == LINE and log.count(LINE) == 1, f"{name}, signal {number}:\n{log}"
    assert not left_over(folder), f"{name}, signal {number}: left {left_over(folder)}\n{log}"
    return "finished" if process.exitcode == 0 else f"stopped by {signal.Signals(number).name}"


def prepare(name: str, folder: Path) -> None:
    """Run the verbs that must precede this one."""
    for needed in VERBS[name].before:
        complete(needed, folder)


def run(name: str, strikes: int, seed: int, folder: Path) -> None:
    """Send the verb `strikes` signals, check every outcome, and print how the runs ended."""
    rng, ends, done = random.Random(f"{seed} {name}"), Counter(), 0
    whole_folder = folder / f"{name}-whole"
    prepare(name, whole_folder)
    whole = complete(name, whole_folder)
    expected = VERBS[name].outcome(whole_folder)
    while done < strikes:
        subfolder = folder / f"{name}-{done}"
        prepare(name, subfolder)
        for _ in range(min(PER_FOLDER, strikes - done)):
            ends[strike(name, subfolder, rng, whole)] += 1
            done += 1
        complete(name, subfolder)
        assert VERBS[name].outcome(subfolder) == expected, f"{subfolder}: another outcome than the undisturbed run's"
    print(f"{name}: {done} signals over {whole:.1f} s: {dict(sorted(ends.items()))}; every rerun equal", flush=True)


def main(arguments: list[str]) -> None:
    """Run every verb and print how its runs ended."""
    counts = {"cache": 40, "distill": 40, "evaluate": 40, "bench": 25, "compare": 30, "ray": 25, "seed": 0}
    counts |= {key: int(value) for key, value in (argument.split("=") for argument in arguments)}
    seed = counts.pop("seed")
    search_path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    os.environ.update(PYTHONPATH=search_path, RAY_USAGE_STATS_ENABLED="0")  # so that actors can import the toy teacher
    with tempfile.TemporaryDirectory() as temporary:
        for name, strikes in counts.items():
            if strikes:
                run(name, strikes, seed, Path(temporary))


if __name__ == "__main__":
    sys.modules["stops"] = sys.modules["__main__"]  # the recipe names the student "stops:Student"
    main(sys.argv[1:])
