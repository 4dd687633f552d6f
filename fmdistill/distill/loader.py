"""Load batches ahead of training, in worker processes, or in threads if shared memory is too small for processes.

Worker processes pass their batches on in shared memory (/dev/shm), of which a container has 64 MB by default. Its free
space is measured before the first batch, and a worker that runs out of it reports that, so that the loader does not
wait forever. Batches and their order depend neither on the number of workers nor on whether these are processes or
threads.
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
from torch.utils.data import DataLoader, Dataset

from fmdistill import stop
from fmdistill.backbones.device import cores
from fmdistill.cache.batch import Batch, BatchReader, Data, Place, collate, fill, map_tensors
from fmdistill.registry import UserError

AHEAD = 2  # batches that each worker has ready, as PyTorch's loader has
GRACE = 5.0  # seconds to wait for a batch after a stop was requested, so that the step can end
PATIENCE = 600.0  # seconds without a batch after which the storage is taken to be unreachable
SHARED = "/dev/shm"

_log = logging.getLogger(__name__)
_logged: set[str] = set()


def batches(data: Data, places: Iterable[list[Place]], workers: int) -> Generator[Batch]:
    """Yield one batch for each list of places, in their order.

    UserError if an image cannot be read, or if no batch comes for `PATIENCE` seconds; Stopped if a stop was requested
    and the next batch does not come within `GRACE` seconds.
    """
    places = iter(places)
    first = next(places, None)
    if first is None:
        return
    places, workers = chain([first], places), _startable(workers)
    if workers == 0:
        yield from (_read_whole(data, chosen) for chosen in places)
    elif _fits_shared_memory(data, first, workers):
        yield from _by_processes(data, places, workers)
    else:
        yield from _by_threads(data, places, workers)


def _by_processes(data: Data, places: Iterator[list[Place]], workers: int) -> Generator[Batch]:
    sampler: Any
    sampler, untaken, read_here = tee(places, 3)
    loader = DataLoader(
        _Samples(data),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_unchanged,
        worker_init_fn=_begin,
        timeout=stop.POLL,
    )
    others = set(multiprocessing.active_children())
    with stop.blocked():
        loading: Any = iter(loader)
    started = set(multiprocessing.active_children()) - others
    full = None
    try:
        with closing(_ahead(lambda chosen: _read_here(data, chosen), read_here, workers)) as parts:
            while (loaded := _next(loading)) is not None:
                if isinstance(loaded, _NoSharedMemory):
                    full = loaded
                    break
                next(untaken)
                batch = _checked(loaded)
                batch.update(next(parts))
                yield batch
    finally:
        loading._shutdown_workers()  # now, since a traceback may keep the garbage collector from it
        for process in started:
            process.kill()  # it may be stuck in a read: it ignores SIGTERM, and Python would wait for it at exit
    if full is not None:
        _warn(f"{full.reason}; from here on {workers} threads load the images. {_way_out()}")
        yield from _by_threads(data, untaken, workers)


def _by_threads(data: Data, places: Iterator[list[Place]], threads: int) -> Generator[Batch]:
    with closing(_ahead(lambda chosen: _read_whole(data, chosen), places, threads)) as loaded:
        yield from loaded


def _ahead(read: Callable[[list[Place]], Any], places: Iterator[list[Place]], threads: int) -> Generator[Any]:
    """Yield what `read` returns for each list of places, read by threads as far ahead as worker processes read."""
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
    # A new thread uses the first GPU, and pinning memory there would cost every process a context on it.
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


def _read_whole(data: Data, chosen: list[Place]) -> Batch:
    return _pinned(fill(data, chosen))


def _read_here(data: Data, chosen: list[Place]) -> Any:
    """Return the part of a batch that no worker process reads."""
    return _pinned(data.read_batch(chosen)) if isinstance(data, BatchReader) else {}


class _NoSharedMemory(NamedTuple):
    """What a worker process returns if shared memory has no room for the batch."""

    reason: str


class _Samples(Dataset):
    def __init__(self, data: Data) -> None:
        self.data = data

    def __getitems__(self, places: list[Place]) -> Batch | UserError | _NoSharedMemory:
        try:
            batch = collate([self.data.item(*place) for place in places])
        except UserError as error:  # returned, since a worker process would raise it with its traceback as text
            return error
        try:  # here, since an error in the queue's own thread would be printed and the batch lost
            return map_tensors(batch, Tensor.share_memory_)
        except (RuntimeError, OSError) as error:
            return _NoSharedMemory(" ".join(str(error).split())[:160])


def _next(loading: Iterator[Any]) -> Any:
    """Return the loader's next batch, or None after the last."""
    began = time.monotonic()
    while True:
        try:
            return next(loading, None)
        except RuntimeError as error:
            if "timed out after" not in str(error):
                raise
        except (ConnectionError, EOFError) as error:  # a worker that dies here takes a batch that it announced along
            raise RuntimeError("a DataLoader worker died while its batch was received") from error
        _wait_on(began)


def _awaited(future: Future[Any]) -> Any:
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
    """Return how many of `workers` to start, at most one for each processor of this process."""
    if workers > (available := cores()):
        _warn(f"workers={workers}: {available} processors are available, so {available} are started", logging.INFO)
    return min(workers, available)


def _fits_shared_memory(data: Data, chosen: list[Place], workers: int) -> bool:
    """Return whether shared memory holds all batches that this machine's worker processes have ready at once."""
    free = _free_shared_memory()
    if free is None:
        return True
    size = _bytes(data.item(*chosen[0]))
    share = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # training processes of this machine
    needed = size * len(chosen) * (AHEAD * workers + 2) * share  # one in use, one on its way to the loop
    if needed <= free:
        return True
    _warn(
        f"{SHARED} has {_readable(free)} free, and {workers} worker processes need {_readable(needed)}; the images "
        f"are loaded in {workers} threads instead. {_way_out()}"
    )
    return False


def _free_shared_memory() -> int | None:
    """Return the free bytes of shared memory: 0 without any, None if the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        status = os.statvfs(SHARED)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


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
    """Log a line once in each process, since training, validation and evaluation each start loaders."""
    kind = line.partition(" ")[0]
    if kind not in _logged:
        _logged.add(kind)
        _log.log(level, "%s", line)


def _checked(loaded: Any) -> Any:
    if isinstance(loaded, UserError):
        raise loaded
    return loaded


def _begin(worker: int) -> None:
    """Leave signals to the training process, and print nothing if it ends in the middle of a batch."""
    stop.ignore()
    report, gone = sys.excepthook, (EOFError, ConnectionError)
    sys.excepthook = lambda kind, error, trace: None if issubclass(kind, gone) else report(kind, error, trace)


def _pinned(batch: Any) -> Any:
    """Return the batch in page-locked memory, from which a GPU copies by itself, if there is a GPU."""
    return map_tensors(batch, Tensor.pin_memory) if torch.cuda.is_available() else batch


def _unchanged(batch: Any) -> Any:
    return batch
