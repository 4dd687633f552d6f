"""Trainings side by side: the same students as one by one, errors and stops of one process reach all."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import toy_digits

from fmdistill import distill, recipe, stop
from fmdistill.files import file_hash
from fmdistill.pipeline import compare, side_by_side
from fmdistill.pipeline.side_by_side import LOG, is_trained, last_step
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError


def recipes(folder: Path, *overrides: str) -> list[Recipe]:
    """Return the toy teacher's recipe with two seeds."""
    path, _ = toy_digits.write(folder)
    return [recipe.load(path, [f"seed={seed}", f"out={folder}/run{seed}", *overrides]) for seed in (0, 1)]


@pytest.mark.slow
def test_two_trainings_give_the_students_of_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    both = recipes(tmp_path, "train.steps=6")
    side_by_side.run(both, 2)
    for settings, alone in zip(both, recipes(tmp_path, "train.steps=6"), strict=True):
        assert is_trained(settings) and last_step(settings) == 6 and (Path(settings.out) / LOG).is_file()
        run = distill.run(recipe.dataclasses.replace(alone, out=f"{alone.out}_alone"))
        assert file_hash(run / "student.safetensors") == file_hash(f"{settings.out}/student.safetensors")
    side_by_side.run(both, 2)  # nothing is left to do


@pytest.mark.slow
def test_one_process_trains_one_recipe_after_the_other(tmp_path):
    both = recipes(tmp_path, "train.steps=6")
    side_by_side.run(both, 1)
    assert all(map(is_trained, both)) and all((Path(settings.out) / LOG).read_text() for settings in both)


@pytest.mark.slow
def test_an_error_of_one_training_ends_all_and_names_its_log(tmp_path):
    both = recipes(tmp_path, "train.steps=100000", "train.checkpoint_every=100000")
    broken = recipe.dataclasses.replace(both[1], train=recipe.dataclasses.replace(both[1].train, batch_size=1000))
    with pytest.raises(UserError, match=r"run1: .*batch_size.*all of its output: .*run1/train.log"):
        side_by_side.run([both[0], broken], 2)
    assert not is_trained(both[0])


@pytest.mark.slow
def test_a_process_that_is_killed_is_an_error(tmp_path):
    both = recipes(tmp_path, "train.steps=100000", "train.log_every=1")

    def kill() -> None:
        while not last_step(both[1]):
            time.sleep(0.05)
        started = subprocess.run(["pgrep", "-P", str(side_by_side.os.getpid())], capture_output=True, text=True)
        side_by_side.os.kill(int(started.stdout.split()[-1]), signal.SIGKILL)

    killing = threading.Thread(target=kill)
    killing.start()
    with pytest.raises(UserError, match=r"run\d: its process ended with code -9 \(all of its output: "):
        side_by_side.run(both, 2)
    killing.join()


@pytest.mark.slow
def test_a_stop_reaches_the_trainings_which_continue_later(tmp_path):
    both = recipes(tmp_path, "train.steps=400", "train.checkpoint_every=1", "train.log_every=1")

    def request() -> None:
        while not all(last_step(settings) for settings in both):
            time.sleep(0.05)
        stop._record(signal.SIGTERM, None)

    asking = threading.Thread(target=request)
    asking.start()
    try:
        with pytest.raises(stop.Stopped):
            side_by_side.run(both, 2)
    finally:
        stop.forget()
        asking.join()
    steps = [last_step(settings) for settings in both]
    assert all(0 < step < 400 for step in steps) and not any(map(is_trained, both))
    rows = [json.loads(line) for line in (Path(both[0].out) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps[0] + 1))
    assert "stopped" in (Path(both[0].out) / LOG).read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a Linux signal")
@pytest.mark.slow
def test_trainings_end_with_a_killed_parent(tmp_path):
    both = recipes(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_pipeline_side_by_side as test\nfrom pathlib import Path\n"
        f"test.side_by_side.run(test.recipes(Path({str(tmp_path)!r}), 'train.steps=100000', 'train.log_every=1'), 2)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 300
    while not all(last_step(settings) for settings in both):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    while not all("stopped" in (Path(settings.out) / LOG).read_text() for settings in both):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_comparison_with_two_jobs_writes_the_table_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    toy_digits.trained(tmp_path)
    both = []
    for name, weighting in (("plain", "uniform"), ("rare", "srw")):
        path = tmp_path / f"{name}.yaml"
        objective = f"{{kd: {{weighting: {{name: {weighting}}}}}}}"
        path.write_text(f"extends: {tmp_path}/student.yaml\nout: {tmp_path}/{name}\nobjective: {objective}\n")
        both.append(str(path))
    one = compare.run(both, 3, ["train.steps=8", f"out={tmp_path}/one"])
    two = compare.run(both, 3, ["train.steps=8", f"out={tmp_path}/two"], jobs=2)
    assert one.with_suffix(".json").read_text() == two.with_suffix(".json").read_text()
    assert two.read_text() == one.read_text().replace("/one/", "/two/")
    lines = json.loads(two.with_suffix(".json").read_text())["top1"]
    assert {line["seeds"] for line in lines} == {3} and len({line["mean"] for line in lines}) > 1
    with pytest.raises(UserError, match="--jobs 0: expected the number of runs at the same time"):
        compare.run(both, 3, jobs=0)


def test_side_by_side_is_for_a_cpu_with_a_core_for_each(tmp_path, monkeypatch):
    both = recipes(tmp_path)
    for cores, expected in ((1, False), (2, True)):
        monkeypatch.setattr(side_by_side, "cores", lambda cores=cores: cores)
        assert side_by_side.fits(both) is expected
    assert not side_by_side.fits(both[:1])


def test_processes_take_the_gpus_in_turn(monkeypatch):
    import torch

    assert side_by_side._gpu(0) == {} or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [side_by_side._gpu(number)["CUDA_VISIBLE_DEVICES"] for number in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [side_by_side._gpu(number)["CUDA_VISIBLE_DEVICES"] for number in range(3)] == ["4", "6", "4"]
