"""Train several recipes at the same time on a CPU, each in a process of its own with its share of the cores."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fmdistill import stop
from fmdistill.backbones.device import cores, pick_device
from fmdistill.distill.student import WEIGHTS
from fmdistill.logs import log, progress, read_json_lines
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
POLL = 0.5  # seconds between looks at the processes
LOG = "train.log"  # in a run's folder: what its process printed


@dataclass(frozen=True)
class Training:
    """A recipe to train: its settings, and the name and overrides by which the command line loads them."""

    settings: Recipe
    path: str
    overrides: Sequence[str] = ()

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.settings.out)

    @property
    def done(self) -> bool:
        """Whether the student is trained already."""
        return (self.out / WEIGHTS).is_file()

    def step(self) -> int:
        """Return the last training step in the run's log, 0 before the first."""
        return max((row.get("step", 0) for row in read_json_lines(self.out / "metrics.jsonl")), default=0)


def fits(trainings: Sequence[Training]) -> bool:
    """Return whether training at the same time is faster here: on a CPU with a core or more for each.

    A small student gains little from a second core: 28 instead of 25 images a second, where two runs make 39 together.
    """
    devices = {pick_device(training.settings.train.device, "train.device").type for training in trainings}
    return devices == {"cpu"} and 1 < len(trainings) <= cores()


def train(trainings: Sequence[Training]) -> None:
    """Train all recipes that are not trained yet, and show one progress bar.

    Stopping this process stops all trainings, and the next call continues them. If one fails, the others are stopped
    too and its error is raised as a UserError.
    """
    waiting = [training for training in trainings if not training.done]
    if not waiting:
        return
    threads = max(cores() // len(waiting), 1)
    steps = [training.settings.train.steps for training in waiting]
    total = sum(filter(None, steps)) if all(steps) else None  # None: by epochs, so a process alone knows
    with ExitStack() as stack:
        processes = [stack.enter_context(_Process(training, threads)) for training in waiting]
        names = " and ".join(training.out.name for training in waiting)
        bar = stack.enter_context(progress(None, f"training {names}", total=total, unit="step"))
        while any([process.running() for process in processes]):
            bar.update(sum(training.step() for training in waiting) - bar.n)
            time.sleep(POLL)
            stop.check()
        bar.update(sum(training.step() for training in waiting) - bar.n)
    for training in waiting:
        log.info("%s: trained", training.out)


def _end_with_parent() -> None:
    """Have Linux send SIGTERM to this process when its parent ends, even by SIGKILL: a rerun must not meet it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class _Process:
    """One training in a process of its own; leaving the context stops the process."""

    def __init__(self, training: Training, threads: int) -> None:
        self.training, self.log = training, training.out / LOG
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "fmdistill", "distill", training.path, *training.overrides]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the trainings
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def __enter__(self) -> "_Process":
        return self

    def running(self) -> bool:
        """Return whether the training continues. Raises UserError if it failed."""
        code = self.process.poll()
        if code:
            lines = self.log.read_text(errors="replace").strip().splitlines() or [f"ended with code {code}"]
            raise UserError(f"{lines[-1].removeprefix('fmdistill: error: ')} (all of its output: {self.log})")
        return code is None

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
