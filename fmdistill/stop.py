"""Stop requests: a handler records SIGINT and SIGTERM, and loops check between two units of work for a request.

So a signal never interrupts code at an arbitrary line. On a request, a loop finishes or abandons its unit (a batch, a
step, a shard, a prompt), saves its state, and raises `Stopped`. A second signal interrupts at once. Without `listen`,
which the command line calls, signals have their usual effect and a stop is never requested.
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
POLL = 1.0  # seconds between checks while waiting
T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """Work ended in order because a stop was requested; `number` is that of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Request:
    number: int | None = None
    at: float = 0.0  # seconds of the monotonic clock


_request = _Request()


def listen() -> None:
    """Record SIGINT and SIGTERM as stop requests from now on, replacing other handlers; only in the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _record)


@contextmanager
def restored() -> Iterator[None]:
    """Handle the signals after the block as before it, also if a library's C++ code replaced the handlers."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with blocked():
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)


def requested() -> int | None:
    """Return the number of the signal that requested a stop, None if no stop was requested."""
    return _request.number


def overdue(seconds: float) -> bool:
    """Return whether a stop was requested more than `seconds` ago."""
    return _request.number is not None and time.monotonic() - _request.at > seconds


def check() -> None:
    """Raise Stopped if a stop was requested; call this between two units of work."""
    if _request.number is not None:
        raise Stopped(_request.number)


def between(items: Iterable[T]) -> Iterator[T]:
    """Yield the items, raising Stopped before an item if a stop was requested; `items` is closed at the end."""
    try:
        for item in items:
            check()
            yield item
    finally:
        if hasattr(items, "close"):  # a generator or progress bar, which else the traceback would keep open
            items.close()  # type: ignore[attr-defined]


def result(future: Future[T], look: Callable[[], object] = check) -> T:
    """Return the future's result or raise its error; meanwhile call `look`, which may raise, every second."""
    while True:
        try:
            return future.result(POLL)
        except NotYet:
            if future.done():  # just now, or the work itself raised this error
                return future.result()
        look()


def ignore() -> None:
    """Ignore both signals in this process, for a worker that ends when its parent says so or has ended."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def blocked() -> Iterator[None]:
    """Block both signals while child processes start; the children inherit the block until they call `ignore`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def forget() -> None:
    """Discard a request, for tests and for a process that continues after it."""
    _request.number = None


def _record(number: int, frame: FrameType | None) -> None:
    if _request.number is not None:  # the second signal
        raise Stopped(number)
    _request.number, _request.at = number, time.monotonic()
