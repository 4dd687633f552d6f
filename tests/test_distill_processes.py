"""Two training processes: the weights of one, each its own slice, one log. torchrun starts this file too."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import spoiled
import tiny
import torch
from safetensors.torch import load_file

from fmdistill import cache, distill
from fmdistill.cache.order import Batches
from fmdistill.distill import tasks

TESTS = Path(__file__).parent
STEPS, BATCH = 12, 8


class Still(tiny.Student):
    """The toy student with its BatchNorm frozen, whose statistics would differ between slices."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.net[1].eval()
        return self


def settings(folder: Path) -> list[str]:
    # one validation image: the second process sees none of it
    validation = ["images.validation=1", "train.validate_every=6"]
    return ["student.name=test_distill_processes:Still", f"out={folder}/two", "train.accumulate=2", *validation]


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def torchrun(folder: Path, *arguments: str, script: str = __file__) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", script, str(folder), *arguments]
    env = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True) as started:
        try:
            _, stderr = started.communicate(timeout=900)
        except subprocess.TimeoutExpired:  # a reduction in which not every process takes part
            os.killpg(started.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, started.returncode, "", stderr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder whose run `two` was trained by two processes."""
    folder = tmp_path_factory.mktemp("processes")
    cache.run(tiny.load(folder, *settings(folder)))
    done = torchrun(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one_from_their_own_slices_and_log_once(trained):
    recipe = tiny.load(trained, *settings(trained))
    one = distill.run(tiny.load(trained, *settings(trained), f"out={trained}/one", "train.accumulate=1"))
    two = trained / "two"
    expected, found = load_file(one / "student.safetensors"), load_file(two / "student.safetensors")
    torch.manual_seed(recipe.seed)
    untrained = Still().state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    moved = max(float((value - untrained[name]).abs().max()) for name, value in expected.items())
    assert moved > 1e-3  # or equal weights would show nothing

    assert [row["step"] for row in rows(two)] == [row["step"] for row in rows(one)]
    for ours, theirs in zip(rows(two), rows(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"loss", "grad_norm", "validation/loss"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)

    opened = cache.open_cache(recipe).shards["train"]
    counts = tuple(len(shard.samples) for shard in opened)
    whole = list(Batches(counts, BATCH, recipe.seed, recipe.train.window).between(0, STEPS))
    seen = [json.loads((two / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert [s["world"] for s in seen] == [2, 2]
    for step, places in enumerate(whole):
        keys = [opened[shard].keys[index] for _, shard, index in places]
        ours = [[key for part in s["keys"][2 * step : 2 * step + 2] for key in part] for s in seen]
        assert ours == [keys[:4], keys[4:]]


@pytest.mark.slow
def test_two_processes_stopped_halfway_resume_to_the_same_weights(trained):
    stopped = trained / "stopped"
    assert torchrun(trained, f"out={stopped}", "stop=6").returncode != 0
    assert (stopped / "checkpoints").exists() and not (stopped / "student.safetensors").exists()
    done = torchrun(trained, f"out={stopped}")
    assert done.returncode == 0, done.stderr[-3000:]
    whole, again = (load_file(run / "student.safetensors") for run in (trained / "two", stopped))
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert rows(stopped) == rows(trained / "two")


@pytest.mark.slow
def test_two_processes_skip_the_steps_that_one_skips(trained):
    """Only one of the processes sees the image that is NaN; the moving average of the weights is compared."""
    own = ["student.name=spoiled:NanImageStill", "train.ema=0.9"]
    done = torchrun(trained, *own, f"out={trained}/spoiled")
    assert done.returncode == 0, done.stderr[-3000:]
    two = trained / "spoiled"
    one = distill.run(tiny.load(trained, *settings(trained), *own, f"out={trained}/spoiled-one", "train.accumulate=1"))
    skipped = [[row.get("skipped") for row in rows(run)] for run in (one, two)]
    assert skipped[0] == skipped[1] and skipped[0][-2] == 4
    assert "the loss is nan for images " in done.stderr and spoiled.KEY in done.stderr
    expected, weights = load_file(one / "student.safetensors"), load_file(two / "student.safetensors")
    assert expected.keys() == weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)


def main(folder: Path, overrides: list[str]) -> None:
    """Train in this process, one of several, and write down what it saw."""
    stop = [int(one.partition("=")[2]) for one in overrides if one.startswith("stop=")]
    recipe = tiny.load(folder, *settings(folder), *[one for one in overrides if not one.startswith("stop=")])
    seen: list[list[str]] = []
    forward = tasks.Distill.forward

    def noted(self, batch):
        if self.training:
            seen.append(batch["keys"])
            if stop and len(seen) > 2 * stop[0]:
                os._exit(3)
        return forward(self, batch)

    tasks.Distill.forward = noted
    distill.run(recipe)
    world = torch.distributed.get_world_size()
    rank = torch.distributed.get_rank()
    (Path(recipe.out) / f"seen-{rank}.json").write_text(json.dumps({"world": world, "keys": seen}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
