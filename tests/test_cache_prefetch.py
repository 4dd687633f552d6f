"""Reading ahead: in order, no further than asked, and over when the teacher stops."""

import logging
import re
import threading
import types

import pytest
import tiny

from fmdistill import cache
from fmdistill.cache import prefetch, teacher_pass
from fmdistill.cache.prefetch import MEMORY, advice, depth, prefetched
from fmdistill.images import Encoded


def encoded(count, read=None, fail=None):
    for i in range(count):
        if i == fail:
            raise OSError(5, "the share is gone")
        if read is not None:
            read.append(i)
        yield Encoded(str(i), b"")


def prepare(index, image):
    return index, image.key


@pytest.mark.parametrize(
    ("count", "batch", "workers", "ahead"), [(10, 3, 4, 2), (9, 3, 1, 1), (1, 5, 2, 7), (0, 2, 2, 2)]
)
def test_batches_come_whole_and_in_order(count, batch, workers, ahead):
    batches = list(prefetched(encoded(count), prepare, batch=batch, workers=workers, ahead=ahead))
    assert [item for items in batches for item in items] == [(i, str(i)) for i in range(count)]
    assert [len(items) for items in batches] == [batch] * (count // batch) + [count % batch] * (count % batch > 0)


def test_order_does_not_hang_on_which_thread_is_done_first():
    later = threading.Event()

    def slow_first(index, image):
        if index == 0:
            assert later.wait(20)
        if index == 5:
            later.set()
        return index

    assert list(prefetched(encoded(6), slow_first, batch=2, workers=2, ahead=2)) == [[0, 1], [2, 3], [4, 5]]


def test_no_more_than_the_batches_ahead_are_read_while_the_teacher_works():
    read, enough = [], threading.Event()

    def note(index, image):
        if index == 4 * 3 - 1:
            enough.set()
        return index

    batches = prefetched(encoded(100, read), note, batch=3, workers=2, ahead=3)
    next(batches)
    assert enough.wait(20)  # the batch in hand and three more
    next(batches)
    batches.close()  # waits for what is under way and drops the rest
    assert 12 <= len(read) <= 15
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]


def test_without_workers_the_caller_decodes_each_batch_when_it_asks_for_it():
    read, threads = [], set()

    def note(index, image):
        threads.add(threading.current_thread())
        return prepare(index, image)

    before = threading.active_count()
    batches = prefetched(encoded(5, read), note, batch=2, workers=0, ahead=3)
    assert next(batches) == [(0, "0"), (1, "1")] and len(read) == 2 and threading.active_count() == before
    assert list(batches) == [[(2, "2"), (3, "3")], [(4, "4")]]
    assert threads == {threading.current_thread()}


def test_an_error_of_the_source_comes_after_the_batches_before_it():
    batches = prefetched(encoded(10, fail=5), prepare, batch=2, workers=2, ahead=4)
    assert [next(batches), next(batches)] == [[(0, "0"), (1, "1")], [(2, "2"), (3, "3")]]
    with pytest.raises(OSError, match="the share is gone"):
        next(batches)
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]


def test_the_depth_gives_every_worker_two_images_as_far_as_memory_bears_them():
    assert depth(batch=4, workers=2, image_size=1024) == 2
    assert depth(batch=1, workers=16, image_size=1024) == 32
    assert depth(batch=4, workers=15, image_size=1024) == 8
    assert depth(batch=256, workers=16, image_size=224) == 2
    assert depth(batch=4096, workers=16, image_size=1024) == 1
    for batch in (1, 3, 64, 200):
        held = depth(batch, 512, 1024) * batch * 3 * 1024**2
        assert MEMORY / 3 < held <= MEMORY


def test_the_advice_names_what_would_help():
    assert advice(0.0312, 2, 16) == "the teacher waited for images 3% of the time"
    assert "42% of the time: 2 decode at once on 16 cores; raise teacher.workers=2" in advice(0.42, 2, 16)
    assert "42% of the time: it decodes them itself; set teacher.workers=1 or more" in advice(0.42, 0, 16)
    assert "teacher.workers=16 fills the 16 cores" in advice(0.42, 16, 16)


@pytest.mark.parametrize(("decoding", "teaching", "share"), [(3.0, 1.0, 75), (1.0, 19.0, 5)])
def test_a_pass_says_at_its_end_how_long_the_teacher_waited(tmp_path, monkeypatch, caplog, decoding, teaching, share):
    clock, real = [100.0], tiny.SamTeacher.__call__

    def one_after_the_other(images, prepare, *, batch, workers, ahead):
        for items in prefetched(images, prepare, batch=batch, workers=workers, ahead=ahead):
            clock[0] += decoding
            yield items

    def teach(*arguments):
        clock[0] += teaching
        return real(*arguments)

    monkeypatch.setattr(teacher_pass, "prefetched", one_after_the_other)
    monkeypatch.setattr(prefetch, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(tiny.SamTeacher, "__call__", teach)
    monkeypatch.setattr(teacher_pass.os, "cpu_count", lambda: 8)
    with caplog.at_level(logging.INFO, "fmdistill"):
        cache.run(tiny.load(tmp_path))
    (said,) = [message for message in caplog.messages if "waited for images" in message]
    assert re.search(r"(\d+)%", said)[1] == str(share)
    assert said.endswith("raise teacher.workers=1") == (share > 10)
