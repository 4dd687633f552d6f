"""Read images in one thread and decode them in several, in order and ahead of the teacher, within a memory limit."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from fmdistill import stop
from fmdistill.images import Encoded

T = TypeVar("T")

AHEAD = 2  # batches at least, if memory allows
ENCODED = 1_000_000  # bytes of a typical photograph as stored
MEMORY = 2_000_000_000  # bytes of images, stored and decoded, that may wait for the teacher
LARGE = 0.1  # share of its time for which the teacher waits, above which a setting should change


def depth(batch: int, workers: int, image_size: int) -> int:
    """Return how many batches to decode ahead: two images a worker, within MEMORY."""
    wanted = max(AHEAD, -(-2 * workers // batch))
    return max(1, min(wanted, MEMORY // (batch * (3 * image_size**2 + ENCODED))))


def prefetched(
    images: Iterable[Encoded], prepare: Callable[[int, Encoded], T], *, batch: int, workers: int, ahead: int
) -> Iterator[list[T]]:
    """Yield `prepare(index, image)` of the images in batches, while threads work on the next `ahead` batches.

    Threads suffice, since reading, decoding and resizing release Python's global lock. With 0 `workers` no thread is
    started, and a batch is read only when it is requested.
    """
    numbered = enumerate(images)
    if not workers:
        while batched := [prepare(index, image) for index, image in islice(numbered, batch)]:
            yield batched
        return
    waiting: deque[Future[list[Future[T]]]] = deque()
    pool, reader = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)

    def read() -> list[Future[T]]:
        return [pool.submit(prepare, index, image) for index, image in islice(numbered, batch)]

    try:
        while True:
            while len(waiting) <= ahead:
                waiting.append(reader.submit(read))
            decoding = stop.result(waiting.popleft())
            if not decoding:
                return
            yield [stop.result(future) for future in decoding]
    finally:
        wait = stop.requested() is None  # a stop does not wait for storage that does not respond
        reader.shutdown(wait=wait, cancel_futures=True)  # first, since it submits work to the pool
        pool.shutdown(wait=wait, cancel_futures=True)


@dataclass
class Waiting:
    """Measures how long the teacher waits for images, since the object was created."""

    started: float = field(default_factory=lambda: time.monotonic())
    seconds: float = 0.0

    def counted(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, adding the time that each takes to come."""
        requested = time.monotonic()
        for batch in batches:
            self.seconds += time.monotonic() - requested
            yield batch
            requested = time.monotonic()

    @property
    def share(self) -> float:
        """The share of the time so far, from 0 to 1."""
        return self.seconds / max(time.monotonic() - self.started, 1e-9)


def advice(share: float, workers: int, cores: int) -> str:
    """Return a line with the share of its time that the teacher waited, and what to change if it is large."""
    line = f"the teacher waited for images {share:.0%} of the time"
    if share <= LARGE:
        return line
    if not workers:
        return f"{line}: it decodes them itself; set teacher.workers=1 or more to decode in other threads"
    if workers < cores:
        return f"{line}: {workers} decode at once on {cores} cores; raise teacher.workers={workers}"
    return f"{line}: teacher.workers={workers} fills the {cores} cores; use smaller images, faster storage, more cores"
