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
from fmdistill.pipeline import side_by_side
from fmdistill.pipeline.side_by_side import Training
from fmdistill.registry import UserError


def trainings(folder, *overrides: str) -> list[Training]:
    """Return the trainings of two seeds of the toy teacher."""
    path, _ = toy_digits.write(folder)
    loaded = []
    for seed in (0, 1):
        settings = [f"seed={seed}", f"out={folder}/run{seed}", *overrides]
        loaded.append(Training(recipe.load(path, settings), str(path), settings))
    return loaded


@pytest.mark.slow
def test_two_trainings_give_the_students_of_one_by_one(tmp_path):
    both = trainings(tmp_path, "train.steps=6")
    side_by_side.train(both)
    for training in both:
        assert training.done and training.step() == 6 and (training.out / side_by_side.LOG).is_file()
        alone = [f"out={training.out}_alone", *(o for o in training.overrides if not o.startswith("out="))]
        run = distill.run(recipe.load(training.path, alone))
        assert file_hash(run / "student.safetensors") == file_hash(training.out / "student.safetensors")
    side_by_side.train(both)  # nothing is left to do


@pytest.mark.slow
def test_an_error_of_one_training_ends_all_and_names_its_log(tmp_path):
    both = trainings(tmp_path, "train.steps=100000", "train.checkpoint_every=100000")
    broken = Training(both[1].settings, both[1].path, [*both[1].overrides, "train.batch_size=1000"])
    with pytest.raises(UserError, match="batch_size.*all of its output: .*run1/train.log"):
        side_by_side.train([both[0], broken])
    assert not both[0].done


@pytest.mark.slow
def test_a_stop_reaches_the_trainings_which_continue_later(tmp_path):
    both = trainings(tmp_path, "train.steps=400", "train.checkpoint_every=1", "train.log_every=1")

    def request() -> None:
        while not all(training.step() for training in both):
            time.sleep(0.05)
        stop._record(signal.SIGTERM, None)

    asking = threading.Thread(target=request)
    asking.start()
    try:
        with pytest.raises(stop.Stopped):
            side_by_side.train(both)
    finally:
        stop.forget()
        asking.join()
    steps = [training.step() for training in both]
    assert all(0 < step < 400 for step in steps) and not any(training.done for training in both)
    rows = [json.loads(line) for line in (both[0].out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps[0] + 1))
    assert "stopped" in (both[0].out / side_by_side.LOG).read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a Linux signal")
@pytest.mark.slow
def test_trainings_end_with_a_killed_parent(tmp_path):
    trainings(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_pipeline_side_by_side as test\nfrom pathlib import Path\n"
        f"test.side_by_side.train(test.trainings(Path({str(tmp_path)!r}), 'train.steps=100000', 'train.log_every=1'))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    both = trainings(tmp_path)
    deadline = time.monotonic() + 300
    while not all(training.step() for training in both):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    while not all("stopped" in (training.out / side_by_side.LOG).read_text() for training in both):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_side_by_side_is_for_a_cpu_with_a_core_for_each(tmp_path, monkeypatch):
    both = trainings(tmp_path)
    for cores, expected in ((1, False), (2, True)):
        monkeypatch.setattr(side_by_side, "cores", lambda cores=cores: cores)
        assert side_by_side.fits(both) is expected
    assert not side_by_side.fits(both[:1])
