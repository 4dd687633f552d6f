"""Kill a training command at random moments until it has finished."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

TESTS = Path(__file__).parent
KILLS = 20


def distil(path: Path, run: Path, settings: Sequence[str], row: int = 240) -> int:
    """Run `fmdistill distill` until it ends, and kill it KILLS times; return the number of kills.

    `row` is the number of bytes that a step adds to the log.
    """
    code = "import sys; from fmdistill.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "distill", str(path), f"out={run}", *settings]
    env = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    kills, rng = 0, random.Random(0)
    for _ in range(10 * KILLS):
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kills < KILLS:
            started = time.monotonic()
            log = run / "metrics.jsonl"
            seen, steps = (log.stat().st_size if log.exists() else 0), rng.uniform(-2, 12)
            # Let it get a little further than before, then kill it somewhere.
            while process.poll() is None and time.monotonic() - started < 60:
                time.sleep(rng.uniform(0, 0.03))
                if log.exists() and log.stat().st_size > seen + row * steps:
                    break
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        process.wait()
        if process.returncode == 0:
            break
    return kills
