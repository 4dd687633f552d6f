import os
import signal
import threading
import time

import pytest
import torch

from fmdistill.distill import data
from fmdistill.registry import UserError


class Numbers:
    counts = (6,)

    def item(self, epoch, shard, index):
        return {"x": torch.tensor(index), "keys": str(index)}


def places():
    return [[(0, 0, 0), (0, 0, 1)], [(0, 0, 2), (0, 0, 3)], [(0, 0, 4), (0, 0, 5)]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_places_whatever_the_workers(workers):
    assert [b["x"].tolist() for b in data.batches(Numbers(), places(), workers)] == [[0, 1], [2, 3], [4, 5]]


def interrupt():
    # from another thread, as the system may deliver Ctrl-C: a signal mask of the main thread would not hold it back
    thread = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
    thread.start()
    thread.join()
    sum(range(10_000))  # Python runs its handlers between two of the main thread's instructions


@pytest.fixture
def listening():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_the_loader_starts_waits_until_it_can_be_cleaned_up(listening):
    done = []
    with pytest.raises(KeyboardInterrupt), data._interrupted_after():
        interrupt()
        done.append(1)
    assert done == [1]
    with pytest.raises(KeyboardInterrupt):  # and the handler from before is back
        interrupt()


def test_a_handler_of_another_library_s_c_code_is_left_alone(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "getsignal", lambda number: None)  # as Python tells of one
    with data._interrupted_after():
        assert signal.signal(signal.SIGTERM, before) == before


def test_a_loader_can_start_in_a_thread_that_is_not_the_main_one():
    found = []
    thread = threading.Thread(target=lambda: found.extend(data.batches(Numbers(), places(), 0)))
    thread.start()
    thread.join()
    assert len(found) == 3


class Beside(Numbers):
    """Of a batch, the sum of its places and the process that read it."""

    counts = (40,)

    def __init__(self) -> None:
        self.read: list[int] = []

    def together(self, places):
        if places[0][2] == 30:
            raise UserError("the embedding of 30 is damaged")
        self.read.append(places[0][2])
        return {"sum": torch.tensor(sum(index for _, _, index in places)), "process": os.getpid()}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_for_a_whole_batch_stays_in_this_process_and_a_few_batches_ahead(workers):
    beside, threads = Beside(), threading.active_count()
    found = data.batches(beside, [[(0, 0, n), (0, 0, n + 1)] for n in range(0, 40, 2)], workers)
    for n in range(0, 20, 2):
        batch = next(found)
        assert batch["x"].tolist() == [n, n + 1] and batch["sum"] == 2 * n + 1 and batch["process"] == os.getpid()
        assert len(beside.read) <= n / 2 + 1 + data.AHEAD * workers
    assert sorted(beside.read)[:10] == list(range(0, 20, 2))
    with pytest.raises(UserError, match="the embedding of 30 is damaged"):
        list(found)
    gone(threads)


def test_a_loader_that_is_left_takes_its_threads_along():
    threads, found = threading.active_count(), data.batches(Beside(), [[(0, 0, n)] for n in range(20)], 2)
    next(found)
    assert threading.active_count() > threads
    found.close()
    gone(threads)


def gone(threads: int) -> None:
    """The threads end by themselves, so that who leaves does not wait for what they read."""
    deadline = time.monotonic() + 30
    while threading.active_count() > threads:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)
