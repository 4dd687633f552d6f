"""Tests of stop requests: the first signal takes effect between units of work, a second one interrupts."""

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from fmdistill import stop


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stop.forget()


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_a_signal_takes_effect_between_two_items(number):
    stop.listen()
    done = []
    with pytest.raises(stop.Stopped) as stopped:
        for item in stop.between(range(5)):
            if item == 2:
                os.kill(os.getpid(), number)
            done.append(item)
    assert done == [0, 1, 2] and stopped.value.number == number


def test_without_a_request_nothing_happens():
    stop.listen()
    stop.check()
    assert list(stop.between("abc")) == ["a", "b", "c"]
    assert stop.requested() is None and not stop.overdue(0)


def test_a_second_signal_interrupts_at_once():
    stop.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested() == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_child_that_ignores_signals_survives_one_during_its_start():
    stop.listen()
    with stop.blocked():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)  # pending, since the mask is inherited
            stop.ignore()
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert stop.requested() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's caught signals from /proc")
def test_a_library_that_resets_the_handler_in_c_does_not_make_sigterm_deadly():
    stop.listen()

    def caught() -> bool:
        mask = re.search(r"^SigCgt:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert mask is not None
        return bool(int(mask[1], 16) >> (signal.SIGTERM - 1) & 1)

    set_in_c = ctypes.CDLL(None).signal
    set_in_c.argtypes, set_in_c.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    assert caught()
    with stop.restored():
        set_in_c(signal.SIGTERM, None)  # SIG_DFL, as Ray's core does when it shuts down
        assert not caught()
    assert caught()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested() == signal.SIGTERM
