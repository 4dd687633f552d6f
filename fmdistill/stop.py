"""Stop requests: SIGINT and SIGTERM are noted, and loops look between two units of work whether one has come.

A signal therefore never interrupts a line of code that did not expect it. Whoever finds a request finishes or gives up
its unit (a batch, a step, a shard, a prompt), saves what it has, and raises `Stopped`. A second signal interrupts at
once. Without `listen`, which the command line calls, signals keep their usual meaning and nothing is ever requested.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL = 1.0  # seconds between looks while something is awaited
T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """A stop was requested and work has ended in order; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Request:
    number: int | None = None
    at: float = 0.0  # seconds of the monotonic clock


_request = _Request()


def listen() -> None:
    """Note SIGINT and SIGTERM from now on, also after a library has set a handler of its own; main thread only."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _note)


def requested() -> int | None:
    """Return the number of the signal that asked to stop, None if there was none."""
    return _request.number


def overdue(seconds: float) -> bool:
    """Return whether a stop was requested more than `seconds` ago."""
    return _request.number is not None and time.monotonic() - _request.at > seconds


def check() -> None:
    """Raise Stopped if a stop was requested; call it where nothing is half done."""
    if _request.number is not None:
        raise Stopped(_request.number)


def between(items: Iterable[T]) -> Iterator[T]:
    """Yield the items; raise Stopped instead of the next one if a stop was requested. What gives them is closed."""
    try:
        for item in items:
            check()
            yield item
    finally:
        if hasattr(items, "close"):  # a generator or a progress bar, which else would last as long as the traceback
            items.close()  # type: ignore[attr-defined]


def result(future: Future[T], look: Callable[[], object] = check) -> T:
    """Return the future's result or raise its error; `look` is called each second until then, and may raise."""
    while True:
        try:
            return future.result(POLL)
        except NotYet:
            if future.done():  # meanwhile, or the work itself raised this very error
                return future.result()
        look()


def ignore() -> None:
    """Ignore both signals in this process: a worker that ends when its parent tells it to, or is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def held() -> Iterator[None]:
    """Hold both signals back for the block, in which child processes start: they inherit that until they `ignore`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def forget() -> None:
    """Forget a request, for tests and for a process that goes on after it."""
    _request.number = None


def _note(number: int, frame: FrameType | None) -> None:
    if _request.number is not None:  # asked twice
        raise Stopped(number)
    _request.number, _request.at = number, time.monotonic()
