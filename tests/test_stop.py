"""Tests of stop requests: the first signal takes effect between units of work, a second one interrupts."""

import os
import signal

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
