"""Kill a training process at random moments until it has finished."""

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fmdistill import distill
from fmdistill import recipe as recipes

KILLS = 20


def distil(path: Path, run: Path, settings: Sequence[str], row: int = 240) -> int:
    """Train the recipe `path` into `run` until it has finished, killing it KILLS times; return the number of kills.

    `row` is the number of bytes that a step adds to the log.
    """
    context = multiprocessing.get_context("forkserver")  # imports torch once for all
    context.set_forkserver_preload(["fmdistill.distill"])
    kills, rng, log = 0, random.Random(0), run / "metrics.jsonl"
    for _ in range(10 * KILLS):
        arguments = (path, [f"out={run}", *settings], torch.get_num_threads())
        process = context.Process(target=_train, args=arguments)
        process.start()
        if kills < KILLS:
            started = time.monotonic()
            seen, steps = (log.stat().st_size if log.exists() else 0), rng.uniform(-2, 12)
            # Let it get a little further than before, then kill it somewhere.
            while process.is_alive() and time.monotonic() - started < 60:
                time.sleep(rng.uniform(0, 0.03))
                if log.exists() and log.stat().st_size > seen + row * steps:
                    break
            if process.is_alive():
                process.kill()
                kills += 1
        process.join()
        if process.exitcode == 0:
            break
    return kills


def _train(path: Path, overrides: list[str], threads: int) -> None:
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as sys.stderr:
        distill.run(recipes.load(path, overrides))
