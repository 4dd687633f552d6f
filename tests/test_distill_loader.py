"""The loader: the same batches whoever loads them, no wait without end, and no dependence on shared memory."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fmdistill import stop
from fmdistill.distill import loader
from fmdistill.registry import UserError

TESTS = Path(__file__).parent


class Numbers:
    """Samples that are their own index, in a tensor of `size` values."""

    counts = (40,)

    def __init__(self, size: int = 1) -> None:
        self.size = size

    def item(self, epoch, shard, index):
        return {"x": torch.full((self.size,), index), "keys": str(index)}


def places(count: int = 6) -> list[list[tuple[int, int, int]]]:
    return [[(0, 0, n), (0, 0, n + 1)] for n in range(0, count, 2)]


def read(found) -> list[list[int]]:
    return [batch["x"][:, 0].tolist() for batch in found]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(loader, "_logged", set())
    monkeypatch.setattr(loader, "_startable", lambda workers: workers)  # also on a machine of one core


@pytest.fixture
def heard(caplog):
    logging.getLogger("fmdistill").propagate = True
    caplog.set_level(logging.INFO, logger="fmdistill")
    return caplog


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_places_whatever_the_workers(workers):
    assert read(loader.batches(Numbers(), places(), workers)) == [[0, 1], [2, 3], [4, 5]]


def test_no_places_are_no_batches():
    assert list(loader.batches(Numbers(), [], 2)) == []


def test_a_loader_can_start_in_a_thread_that_is_not_the_main_one():
    found = []
    thread = threading.Thread(target=lambda: found.extend(loader.batches(Numbers(), places(), 0)))
    thread.start()
    thread.join()
    assert len(found) == 3


class Beside(Numbers):
    """Of a batch, the sum of its places and the process that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def read_batch(self, places):
        if places[0][2] == 30:
            raise UserError("the embedding of 30 is damaged")
        self.read.append(places[0][2])
        return {"sum": torch.tensor(sum(index for _, _, index in places)), "process": os.getpid()}


@pytest.mark.parametrize(("workers", "free"), [(0, None), (2, None), (2, 0)])
def test_what_is_read_for_a_whole_batch_stays_in_this_process_and_a_few_batches_ahead(workers, free, monkeypatch):
    monkeypatch.setattr(loader, "_free_shared_memory", lambda: free)
    beside, threads = Beside(), threading.active_count()
    found = loader.batches(beside, places(40), workers)
    for n in range(0, 20, 2):
        batch = next(found)
        assert batch["x"][:, 0].tolist() == [n, n + 1]
        assert batch["sum"] == 2 * n + 1 and batch["process"] == os.getpid()
        assert len(beside.read) <= n / 2 + 1 + loader.AHEAD * workers
    assert sorted(beside.read)[:10] == list(range(0, 20, 2))
    with pytest.raises(UserError, match="the embedding of 30 is damaged"):
        list(found)
    gone(threads)


def test_a_loader_that_is_left_takes_its_threads_along():
    threads, found = threading.active_count(), loader.batches(Beside(), places(40), 2)
    next(found)
    assert threading.active_count() > threads
    found.close()
    gone(threads)


def gone(threads: int) -> None:
    """The threads end by themselves, so that who leaves does not wait for what they read."""
    deadline = time.monotonic() + 600
    while threading.active_count() > threads:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


class Processes(Numbers):
    """Samples that tell which process made them."""

    def item(self, epoch, shard, index):
        return {**super().item(epoch, shard, index), "process": os.getpid()}


def test_too_little_shared_memory_is_measured_before_the_first_batch_and_threads_load(heard, monkeypatch):
    monkeypatch.setattr(loader, "_free_shared_memory", lambda: 64_000_000)
    big = Processes(size=1_000_000)  # 8 MB an item, 16 a batch, (2 * 2 + 2) batches are 96 MB
    found = list(loader.batches(big, places(), 2))
    assert read(found) == [[0, 1], [2, 3], [4, 5]]
    assert {process for batch in found for process in batch["process"]} == {os.getpid()}
    (line,) = [record.getMessage() for record in heard.records]
    assert line.startswith("/dev/shm has 64 MB free, and 2 worker processes need 96 MB; ") and "--ipc=host" in line
    list(loader.batches(big, places(), 2))
    assert len(heard.records) == 1  # once, however many loaders


def test_enough_shared_memory_is_used_by_processes(monkeypatch):
    monkeypatch.setattr(loader, "_free_shared_memory", lambda: 96_000_000)
    found = list(loader.batches(Processes(size=1_000_000), places(), 2))
    assert os.getpid() not in {process for batch in found for process in batch["process"]}


def refuse(tensor: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_shared_memory_that_is_used_up_later_is_one_line_and_threads_go_on_with_the_same_batch(heard, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    found = list(loader.batches(Processes(), places(10), 2))
    assert read(found) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert {process for batch in found for process in batch["process"]} == {os.getpid()}
    (line,) = [record.getMessage() for record in heard.records]
    assert "No space left on device" in line and "2 threads" in line and "\n" not in line


class Stuck(Numbers):
    """Samples of which one does not come while the test runs, in whichever process or thread is asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def item(self, epoch, shard, index):
        if index == 4 and (torch.utils.data.get_worker_info() or threading.current_thread().name != "MainThread"):
            self.released.wait(60)
        return super().item(epoch, shard, index)


@pytest.fixture
def stuck():
    threads, data = threading.active_count(), Stuck()
    yield data
    data.released.set()
    gone(threads)


@pytest.mark.slow
@pytest.mark.parametrize("free", [None, 0])
def test_a_wait_for_images_that_never_come_ends_in_one_line(free, monkeypatch, stuck):
    monkeypatch.setattr(loader, "_free_shared_memory", lambda: free)
    monkeypatch.setattr(stop, "POLL", 0.1)
    monkeypatch.setattr(loader, "PATIENCE", 0.5)
    with pytest.raises(UserError, match=r"no batch of images came for .* minutes: .*stuck"):
        list(loader.batches(stuck, places(), 1))


@pytest.mark.slow
@pytest.mark.parametrize("free", [None, 0])
def test_a_requested_stop_ends_the_wait_for_images(free, monkeypatch, stuck):
    monkeypatch.setattr(loader, "_free_shared_memory", lambda: free)
    monkeypatch.setattr(stop, "POLL", 0.1)
    monkeypatch.setattr(loader, "GRACE", 0.2)
    found = loader.batches(stuck, places(), 1)
    assert next(found)["keys"] == ["0", "1"]
    monkeypatch.setattr(stop._request, "number", signal.SIGTERM)
    monkeypatch.setattr(stop._request, "at", time.monotonic())
    assert next(found)["keys"] == ["2", "3"]  # what is there is still given, so that a step can end
    with pytest.raises(stop.Stopped):
        next(found)


class Dying(Numbers):
    """Samples of which one kills its process."""

    def item(self, epoch, shard, index):
        if index == 4 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().item(epoch, shard, index)


def test_a_worker_that_dies_is_an_error_and_no_wait():
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(loader.batches(Dying(), places(), 1))


def test_no_more_workers_are_started_than_there_are_processors_which_is_said_once(heard, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(loader, "_logged", set())
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    assert [loader._startable(count) for count in (0, 1, 2, 8, 8)] == [0, 1, 2, 2, 2]
    assert [r.getMessage() for r in heard.records] == ["workers=8: 2 processors are available, so 2 are started"]


SMALL = """
import logging, sys
logging.basicConfig(format="%(message)s")
sys.path.insert(0, {tests!r})
from test_distill_loader import Numbers, places, read
from fmdistill.distill import loader
loader._startable = lambda workers: workers
print(read(loader.batches(Numbers(size=400_000), places(40), 2)))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/self/ns/mnt").exists(), reason="mounts, so it needs root")
@pytest.mark.parametrize("size", ["64m", "256k"])
def test_a_container_s_shared_memory_loads_every_batch(size):
    mounted = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {sys.executable} -c "$SCRIPT"'
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    environment["SCRIPT"] = SMALL.format(tests=str(TESTS))
    done = subprocess.run(["unshare", "-m", "sh", "-c", mounted], env=environment, capture_output=True, timeout=900)
    if b"unshare" in done.stderr or b"mount" in done.stderr:
        pytest.skip(done.stderr.decode())
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == str([[n, n + 1] for n in range(0, 40, 2)])
    assert (b"threads instead" in done.stderr) == (size == "256k")
