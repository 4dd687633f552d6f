"""Train several recipes at the same time, each in a process of its own with its GPU or its share of the cores."""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fmdistill import stop
from fmdistill.backbones.device import cores, pick_device
from fmdistill.distill.student import WEIGHTS
from fmdistill.logs import progress, read_json_lines
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.stages import by_stage

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
POLL = 0.5  # seconds between looks at the processes
LOG = "train.log"  # in a run's folder: what its process printed


def fits(recipes: Sequence[Recipe]) -> bool:
    """Return whether training at the same time is faster here: on a CPU with a core or more for each.

    A small student gains little from a second core: 28 instead of 25 images a second, where two runs make 39 together.
    """
    devices = {pick_device(recipe.train.device, "train.device").type for recipe in recipes}
    return devices == {"cpu"} and 1 < len(recipes) <= cores()


def is_trained(recipe: Recipe) -> bool:
    """Return whether the recipe's run is finished."""
    return (Path(recipe.out) / WEIGHTS).is_file()


def last_step(recipe: Recipe) -> int:
    """Return the last training step in the log of the recipe's run, 0 before the first; of stages, their sum."""
    logs = [read_json_lines(Path(stage.out) / "metrics.jsonl") for stage in by_stage(recipe).values()]
    return sum(max((row.get("step", 0) for row in rows), default=0) for rows in logs)


def _steps(recipe: Recipe) -> int | None:
    """Return the steps of all stages of a recipe, None if one of them counts epochs."""
    steps = [stage.train.steps for stage in by_stage(recipe).values()]
    return None if None in steps else sum(filter(None, steps))


def run(recipes: Sequence[Recipe], jobs: int, evaluate: bool = False) -> None:
    """Train the recipes in their order, `jobs` at a time, with a progress bar for each; evaluate each run if requested.

    The caches must be finished. On a CPU a process computes with its share of the cores, or with OMP_NUM_THREADS
    threads; otherwise the processes take the GPUs in turn. Stopping this process stops all trainings, and the next call
    continues them. If one fails, the others are stopped too and its error is raised as a UserError.
    """
    waiting = deque(recipe for recipe in recipes if evaluate or not is_trained(recipe))
    with ExitStack() as stack:
        count = min(jobs, len(waiting))
        workers = [stack.enter_context(_Worker(number, count)) for number in range(count)]
        while waiting or any(worker.recipe for worker in workers):
            for worker in workers:
                if worker.recipe is None and waiting:
                    worker.begin(waiting.popleft(), evaluate)
                worker.look()
            time.sleep(POLL)
            stop.check()


class _Worker:
    """A process that trains one recipe after the other; leaving the context stops it."""

    def __init__(self, number: int, count: int) -> None:
        self.recipe: Recipe | None = None
        self.bar: Any = None
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(cores() // count, 1))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fmdistill.pipeline.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_gpu(number), "OMP_NUM_THREADS": threads},
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the trainings
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )

    def __enter__(self) -> "_Worker":
        return self

    def begin(self, recipe: Recipe, evaluate: bool) -> None:
        """Have the process train the recipe."""
        self.recipe = recipe
        self.bar = progress(None, f"training {recipe.out}", total=_steps(recipe), unit="step")
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"recipe": asdict(recipe), "evaluate": evaluate}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._fail("")

    def look(self) -> None:
        """Show the steps done. Raises UserError if the training failed; if it is finished, `recipe` becomes None."""
        if self.recipe is None:
            return
        self.bar.update(last_step(self.recipe) - self.bar.n)
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], 0)[0]:
            return
        answer = self.process.stdout.readline()
        if answer != "done\n":
            self._fail(answer)
        self.bar.close()
        self.recipe = None

    def _fail(self, answer: str) -> None:
        assert self.recipe is not None
        reason = json.loads(answer) if answer else f"its process ended with code {self.process.wait()}"
        raise UserError(f"{self.recipe.out}: {reason} (all of its output: {Path(self.recipe.out) / LOG})")

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.recipe is not None:
            self.process.terminate()
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.close()  # its process ends when no recipe follows
        except BrokenPipeError:
            pass
        self.process.wait()
        self.process.stdout.close()


def _end_with_parent() -> None:
    """Have Linux send SIGTERM to this process when its parent ends, even by SIGKILL: a rerun must not meet it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _gpu(number: int) -> dict[str, str]:
    """Return the environment by which process `number` sees one GPU, the GPUs in turn; {} if there is none."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[number % len(visible)]}
