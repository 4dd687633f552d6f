"""Images read by one thread and decoded by several, ahead of the teacher and in order, as far as memory bears."""

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

AHEAD = 2  # batches at least, where memory bears them
ENCODED = 1_000_000  # bytes of a stored photograph
MEMORY = 2_000_000_000  # bytes that wait for the teacher, as stored or decoded
LARGE = 0.1  # share of the time that the teacher waits, from which on something is worth changing


def depth(batch: int, workers: int, image_size: int) -> int:
    """Return the batches to decode while the teacher works on one: two images a worker, as far as MEMORY holds them."""
    wanted = max(AHEAD, -(-2 * workers // batch))
    return max(1, min(wanted, MEMORY // (batch * (3 * image_size**2 + ENCODED))))


def prefetched(
    images: Iterable[Encoded], prepare: Callable[[int, Encoded], T], *, batch: int, workers: int, ahead: int
) -> Iterator[list[T]]:
    """Yield the images in batches, `prepare(index, image)` of each, with `ahead` batches more on their way.

    Threads suffice, since reading, decoding and resizing leave Python's lock to the others. With 0 `workers` there is
    none, and no image is read before its batch is asked for.
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
        wait = stop.requested() is None  # who stops does not wait for a storage that does not answer
        reader.shutdown(wait=wait, cancel_futures=True)  # first, since it gives the pool its work
        pool.shutdown(wait=wait, cancel_futures=True)


@dataclass
class Waiting:
    """How long the teacher waited for images, of the time since this was made."""

    started: float = field(default_factory=lambda: time.monotonic())
    seconds: float = 0.0

    def counted(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches; the time that each is awaited counts."""
        asked = time.monotonic()
        for batch in batches:
            self.seconds += time.monotonic() - asked
            yield batch
            asked = time.monotonic()

    @property
    def share(self) -> float:
        """The share of the time so far, 0 to 1."""
        return self.seconds / max(time.monotonic() - self.started, 1e-9)


def advice(share: float, workers: int, cores: int) -> str:
    """Return what to say of the share of its time that the teacher waited, and what to change where it is large."""
    said = f"the teacher waited for images {share:.0%} of the time"
    if share <= LARGE:
        return said
    if not workers:
        return f"{said}: it decodes them itself; set teacher.workers=1 or more to decode beside it"
    if workers < cores:
        return f"{said}: {workers} decode at once on {cores} cores; raise teacher.workers={workers}"
    return f"{said}: teacher.workers={workers} fills the {cores} cores; use smaller images, nearer ones, or more cores"
