"""Load batches ahead of training, in worker processes, or in threads if shared memory is too small for processes.

Worker processes hand their batches over in shared memory (/dev/shm), of which a container has 64 MB unless told
otherwise. It is measured before the first batch, and a worker that meets its end says so instead of leaving the loader
waiting. Batches are the same, in the same order, whatever the number of workers and however they work.
"""

import logging
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import chain, tee
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fmdistill import stop
from fmdistill.distill.data import Data, Place, Together, changed
from fmdistill.registry import UserError

AHEAD = 2  # batches that each worker has ready, as PyTorch's loader has
GRACE = 5.0  # seconds after a requested stop for which a batch is awaited, so that the step can end
PATIENCE = 600.0  # seconds without a batch after which the images are taken to be out of reach
SHARED = "/dev/shm"

_log = logging.getLogger(__name__)
_logged: set[str] = set()


def batches(data: Data, places: Iterable[list[Place]], workers: int) -> Generator[dict[str, Any]]:
    """Yield one collated batch for each list of places, in their order.

    UserError if a sample cannot be read, or if no batch came for `PATIENCE` seconds; Stopped if a stop was requested
    and the next batch is not there within `GRACE` seconds.
    """
    places = iter(places)
    first = next(places, None)
    if first is None:
        return
    places, workers = chain([first], places), _startable(workers)
    if workers == 0:
        yield from (_whole(data, chosen) for chosen in places)
    elif _fits_shared_memory(data, first, workers):
        yield from _by_processes(data, places, workers)
    else:
        yield from _by_threads(data, places, workers)


def _by_processes(data: Data, places: Iterator[list[Place]], workers: int) -> Generator[dict[str, Any]]:
    sampler: Any
    sampler, again, beside = tee(places, 3)
    loader = DataLoader(
        _Items(data),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_as_it_is,
        worker_init_fn=_begin,
        timeout=stop.POLL,
    )
    others = set(multiprocessing.active_children())
    with stop.blocked():
        loading: Any = iter(loader)
    started = set(multiprocessing.active_children()) - others
    full = None
    try:
        with closing(_ahead(lambda chosen: _together(data, chosen), beside, workers)) as read:
            while (loaded := _next(loading)) is not None:
                if isinstance(loaded, _NoSharedMemory):
                    full = loaded
                    break
                next(again)
                yield {**_checked(loaded), **next(read)}
    finally:
        loading._shutdown_workers()  # not left to the garbage collector, for which a traceback may hold it back
        for process in started:
            process.kill()  # one that is stuck in reading: it ignores SIGTERM, and Python would wait for it at its end
    if full is not None:
        _warn(f"{full.reason}; from here on {workers} threads load the images. {_way_out()}")
        yield from _by_threads(data, again, workers)


def _by_threads(data: Data, places: Iterator[list[Place]], threads: int) -> Generator[dict[str, Any]]:
    with closing(_ahead(lambda chosen: _whole(data, chosen), places, threads)) as loaded:
        yield from loaded


def _ahead(
    read: Callable[[list[Place]], dict[str, Any]], places: Iterator[list[Place]], threads: int
) -> Generator[dict[str, Any]]:
    """Yield what `read` gives for each list of places, read as far ahead as the loader's workers are."""
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
    # A thread begins with the first GPU, on which to pin memory would cost every process a context.
    own = {} if gpu is None else {"initializer": torch.cuda.set_device, "initargs": (gpu,)}
    pool, waiting = ThreadPoolExecutor(threads, **own), deque()
    try:
        for chosen in places:
            waiting.append(pool.submit(read, chosen))
            if len(waiting) > AHEAD * threads:
                yield _awaited(waiting.popleft())
        while waiting:
            yield _awaited(waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a download may take minutes


def _whole(data: Data, chosen: list[Place]) -> dict[str, Any]:
    return {**_pinned(_checked(_Items(data).__getitems__(chosen))), **_together(data, chosen)}


def _together(data: Data, chosen: list[Place]) -> dict[str, Any]:
    return _pinned(data.together(chosen)) if isinstance(data, Together) else {}


class _NoSharedMemory(NamedTuple):
    """What a worker returns in a batch's place if shared memory has no room for it."""

    reason: str


class _Items(Dataset):
    def __init__(self, data: Data) -> None:
        self.data = data

    def __getitems__(self, places: list[Place]) -> dict[str, Any] | UserError | _NoSharedMemory:
        try:
            batch = _stack([self.data.item(*place) for place in places])
        except UserError as error:  # returned, since a worker would wrap it in a traceback
            return error
        if get_worker_info() is None:
            return batch
        try:  # here, since in the queue's own thread an error would be printed and the batch lost
            return changed(batch, Tensor.share_memory_)
        except (RuntimeError, OSError) as error:
            return _NoSharedMemory(" ".join(str(error).split())[:160])


def _next(loading: Iterator[Any]) -> Any:
    """Return the loader's next batch, None after the last."""
    began = time.monotonic()
    while True:
        try:
            return next(loading, None)
        except RuntimeError as error:
            if "timed out after" not in str(error):
                raise
        _wait_on(began)


def _awaited(future: Future[dict[str, Any]]) -> dict[str, Any]:
    return stop.result(future, partial(_wait_on, time.monotonic()))


def _wait_on(began: float) -> None:
    if stop.overdue(GRACE):
        stop.check()
    if time.monotonic() - began > PATIENCE:
        raise UserError(
            f"no batch of images came for {PATIENCE / 60:g} minutes: the workers that load them are stuck; is the "
            f"storage of images.root and cache.root reachable? The same command continues where it stopped"
        )


def _startable(workers: int) -> int:
    """Return how many of `workers` to start: no more than there are processors for this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers > cores:
        _warn(f"workers={workers}: {cores} processors are available, so {cores} are started", logging.INFO)
    return min(workers, cores)


def _fits_shared_memory(data: Data, chosen: list[Place], workers: int) -> bool:
    """Return whether shared memory holds what the worker processes of this machine have ready at once."""
    free = _free_shared_memory()
    if free is None:
        return True
    item = _bytes(data.item(*chosen[0]))
    share = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # training processes of this machine
    needed = item * len(chosen) * (AHEAD * workers + 2) * share  # one in the loop's hands, one on its way there
    if needed <= free:
        return True
    _warn(
        f"{SHARED} has {_readable(free)} free, and {workers} worker processes need {_readable(needed)}; the images "
        f"are loaded in {workers} threads instead. {_way_out()}"
    )
    return False


def _free_shared_memory() -> int | None:
    """Return the free bytes of shared memory, 0 if there is none, None if this system does not say."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = os.statvfs(SHARED)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _way_out() -> str:
    return "A container gets more by docker run --ipc=host, or --shm-size=8g"


def _readable(count: float) -> str:
    unit, size = ("kB", 1e3) if count < 1e6 else ("MB", 1e6) if count < 1e9 else ("GB", 1e9)
    return f"{count / size:.3g} {unit}"


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value.values())) if isinstance(value, dict) else 0


def _warn(line: str, level: int = logging.WARNING) -> None:
    """Log a line once a process: training, validation and evaluation each start loaders."""
    kind = line.partition(" ")[0]
    if kind not in _logged:
        _logged.add(kind)
        _log.log(level, "%s", line)


def _checked(loaded: Any) -> dict[str, Any]:
    if isinstance(loaded, UserError):
        raise loaded
    return loaded


def _begin(worker: int) -> None:
    """Leave signals to the training process, and say nothing when it goes away in the middle of a batch."""
    stop.ignore()
    report, gone = sys.excepthook, (EOFError, ConnectionError)
    sys.excepthook = lambda kind, error, trace: None if issubclass(kind, gone) else report(kind, error, trace)


def _pinned(batch: Any) -> Any:
    """Return the batch in memory that a GPU copies from by itself, if there is a GPU."""
    return changed(batch, Tensor.pin_memory) if torch.cuda.is_available() else batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _stack(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: _stack([value[key] for value in values]) for key in values[0]}
    return torch.stack(values) if isinstance(values[0], Tensor) else values
