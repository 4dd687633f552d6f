"""Data: what a task trains on, item by item, and the loader that follows the order and nothing else."""

import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import tee
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fmdistill.images import Encoded, Images, Shard
from fmdistill.images.kept import Kept
from fmdistill.registry import UserError

AHEAD = 2  # batches that each worker has ready, as PyTorch's loader has
Place = tuple[int, int, int]  # (epoch, shard, index)


class Data(Protocol):
    """Samples of one split, in shards of a fixed order."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the samples of each shard."""
        ...

    def item(self, epoch: int, shard: int, index: int) -> dict[str, Any]:
        """Return one sample as tensors and texts; anything random draws from (seed, epoch, key)."""
        ...


@runtime_checkable
class Together(Protocol):
    """Data of which a part is read for a whole batch at once, into the tensors that training gets.

    Threads of the training process read it: through a worker process, reading would take several times as long.
    """

    def together(self, places: Sequence[Place]) -> dict[str, Any]:
        """Return that part of the batch of `places`; `item` gives the rest. Threads call it."""
        ...


class Prepared(NamedTuple):
    """An image ready for training: pixels uint8 (3, S, S), size (h, w), and what the task has beside it."""

    key: str
    pixels: Tensor
    size: tuple[int, int]
    beside: Any
    nbytes: int


@dataclass(frozen=True)
class SplitImages:
    """One split of a source's images, found by the numbers of shard and image; a process keeps `memory` GB of them."""

    images: Images
    split: str
    memory: float = field(default=0.0, kw_only=True)

    @cached_property
    def shards(self) -> list[Shard]:
        """The split's shards in the order of their names."""
        return sorted((s for s in self.images.shards() if s.split == self.split), key=lambda s: s.name)

    @property
    def counts(self) -> tuple[int, ...]:
        """The samples of each shard."""
        return tuple(self.images.source.count(s.name) if s.take is None else s.take for s in self.shards)

    @cached_property
    def keys(self) -> dict[int, list[str]]:
        """The keys of each shard, filled as shards are first used."""
        return {}

    @cached_property
    def kept(self) -> Kept[Prepared]:
        """What this process need not prepare again."""
        return Kept(self.memory, lambda prepared: prepared.nbytes)

    def prepared(self, shard: int, index: int) -> Prepared:
        """Return the image ready for training, prepared now or kept."""
        return self.kept.get((shard, index), lambda: self.prepare(*self.encoded(shard, index)))

    def prepare(self, name: str, encoded: Encoded) -> Prepared:
        """Return the image of shard `name` ready for training. UserError where it lacks what the task needs."""
        raise NotImplementedError

    def encoded(self, shard: int, index: int) -> tuple[str, Encoded]:
        """Return the shard's name and the image as stored."""
        name = self.shards[shard].name
        if shard not in self.keys:
            self.keys[shard] = self.images.source.keys(name)
        return name, self.images.source.fetch(name, self.keys[shard][index])


class _Items(Dataset):
    def __init__(self, data: Data) -> None:
        self.data = data

    def __getitems__(self, places: list[Place]) -> dict[str, Any] | UserError:
        try:
            return _stack([self.data.item(*place) for place in places])
        except UserError as error:  # returned, since a worker would wrap it in a traceback
            return error


def batches(data: Data, places: Iterable[list[Place]], workers: int) -> Iterator[dict[str, Any]]:
    """Yield one collated batch for each list of places, in their order, whatever the number of workers."""
    sampler: Any
    sampler, again = tee(places)
    loader = DataLoader(
        _Items(data),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_as_it_is,
        worker_init_fn=_quiet,
    )
    with _interrupted_after():
        loaded = iter(loader)
    with closing(_together(data, again, workers)) as beside:
        for batch in loaded:
            if isinstance(batch, UserError):
                raise batch
            yield {**batch, **next(beside)}


def _together(data: Data, places: Iterator[list[Place]], threads: int) -> Generator[dict[str, Any]]:
    """Yield what data gives for whole batches, read as far ahead as the loader's workers are."""
    if not isinstance(data, Together):
        yield from ({} for _ in places)
    elif not threads:
        yield from (_pinned(data.together(chosen)) for chosen in places)
    else:
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        # a thread begins with the first GPU, on which to pin memory would cost every process a context
        own = {} if gpu is None else {"initializer": torch.cuda.set_device, "initargs": (gpu,)}
        pool, waiting = ThreadPoolExecutor(threads, **own), deque()
        try:
            for chosen in places:
                waiting.append(pool.submit(lambda chosen: _pinned(data.together(chosen)), chosen))
                if len(waiting) > AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a download may take minutes


def every(data: Data, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[list[Place]]:
    """Yield places such that all processes together see every sample exactly once, in order."""
    places = [(0, shard, index) for shard, count in enumerate(data.counts) for index in range(count)]
    ours = places[rank::world]
    for start in range(0, len(ours), batch_size):
        yield ours[start : start + batch_size]


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on `device`."""
    return _changed(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _pinned(batch: Any) -> Any:
    """Return the batch as the loader gives its part: in memory that a GPU copies from by itself, where there is one."""
    return _changed(batch, Tensor.pin_memory) if torch.cuda.is_available() else batch


def _changed(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {key: _changed(value, change) for key, value in batch.items()}
    return batch


@contextmanager
def _interrupted_after() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the block's end: half-started, a loader cannot be cleaned up without a traceback.

    The workers that start in the block keep ignoring Ctrl-C: it is the training process's, which stops them. A signal
    mask would not do, since any other thread of this process may take the signal.
    """
    if threading.current_thread() is not threading.main_thread():  # Python interrupts the main thread only
        yield
        return
    caught: list[int] = []
    # not those that another library's C code handles, which Python could not give back
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not None]
    handlers = [signal.signal(number, lambda number, frame: caught.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])


def _quiet(worker: int) -> None:
    """Say nothing when the training process goes away in the middle of a batch."""
    report = sys.excepthook
    gone = (EOFError, ConnectionError)
    sys.excepthook = lambda kind, error, trace: None if issubclass(kind, gone) else report(kind, error, trace)


def _as_it_is(batch: Any) -> Any:
    return batch


def _stack(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: _stack([value[key] for value in values]) for key in values[0]}
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else values
