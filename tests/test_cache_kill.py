"""SIGKILL at any moment, two writers at once: the cache ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

TESTS = Path(__file__).parent


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "recipe.yaml"}


def start(root: Path, job: list[str]) -> subprocess.Popen:
    code = "import sys; from fmdistill.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "cache", *job, f"cache.root={root}"]
    env = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def maps(folder: Path) -> list[str]:
    return [str(tiny.write(folder)), "images.train=480", "images.validation=160"]


def vectors(folder: Path) -> list[str]:
    size = ["images.train=480", "images.validation=96", "images.shard_size=48"]
    return ["recipes/demo/clip_mse.yaml", *size, "teacher.weights=none", "teacher.workers=0"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "wanted"), [(maps, 20), (vectors, 3)])
def test_sigkill_at_many_moments_leaves_the_bytes_of_an_undisturbed_run(tmp_path, kind, wanted):
    job = kind(tmp_path)
    assert start(tmp_path / "whole", job).wait(900) == 0
    root, rng, kills = tmp_path / "killed", random.Random(0), 0
    for _ in range(60):
        process = start(root, job)
        if kills < wanted:
            before = len(list(root.glob("*.json"))) if root.exists() else 0
            # Kill it within a shard or two of its beginning, so that it takes all the kills to get through.
            while process.poll() is None and not (root.exists() and len(list(root.glob("*.json"))) > before):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.08))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        process.wait()
        if process.returncode == 0:
            break
    assert kills == wanted
    assert contents(root) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_writers_racing_for_the_same_shards_leave_one_sound_cache(tmp_path):
    assert start(tmp_path / "whole", maps(tmp_path)).wait(900) == 0
    both = [start(tmp_path / "raced", maps(tmp_path)) for _ in range(2)]
    assert [process.wait(900) for process in both] == [0, 0]
    assert contents(tmp_path / "raced") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_writers_of_one_folder_leave_the_bytes_of_an_undisturbed_run():
    script, kills = TESTS.parent / "benchmarks/kills.py", ["one=0", "two=2", "race=3", "publish=5", "ray=0"]
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, *kills], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for situation in ("two: 2 kills", "race: 3 kills", "publish: 5 kills"):
        assert situation in done.stdout
