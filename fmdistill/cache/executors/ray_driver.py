"""Actors that each hold a teacher, and the driver that hands out shards: actors may come late, die, and be preempted.

Ray places, starts and watches the actors. A shard whose actor died goes to the next one that is free: Ray's own retry
would bind it to a machine that may never come back. Nothing has to be undone, since a shard is idempotent.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Condition, Thread, get_ident
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from fmdistill import stop
from fmdistill.cache.executors.processes import Plan
from fmdistill.cache.teacher_pass import Pass
from fmdistill.files import Process
from fmdistill.images import Shard
from fmdistill.logs import log, progress
from fmdistill.registry import UserError

POLL = 1.0  # seconds between looks at whether the work is over meanwhile
WAIT = 30.0  # seconds between looks at whether the cluster has grown; and until a person is told that an actor waits
LOADING = "the teacher's loading"  # what an actor does before its first shard


class Caching:
    """The actor: a teacher that writes shard after shard. It loads it when asked, for an error of that to come back."""

    def __init__(self, start: Callable[..., Pass], folder: str) -> None:
        self.start = start
        if os.path.isdir(folder):  # the driver's, so that a recipe's relative paths mean the same
            os.chdir(folder)

    def load(self) -> Process:
        """Load the teacher and return this process; UserError if it is not the one that the cache's manifest names."""
        self.work = self.start()
        return Process.own()

    def write(self, shard: Shard, expected: int) -> Iterator[int]:
        """Write one shard; yield the images of each batch as it is encoded."""
        self.work.expected = expected
        told = _Told()
        with ThreadPoolExecutor(1) as thread:
            written = thread.submit(self.work.run, [shard], told)  # type: ignore[arg-type]
            written.add_done_callback(lambda _: told.update(0))
            while (images := told.counts.get()) or not written.done():
                yield images
            written.result()


class _Told:
    """In a progress bar's place: the counts go to the driver."""

    def __init__(self) -> None:
        self.counts: SimpleQueue[int] = SimpleQueue()

    def update(self, images: int) -> None:
        """Tell of so many more images."""
        self.counts.put(images)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Tell nobody: the share of waiting is one actor's, and in its log."""


@dataclass
class Driver:
    """Hands out the missing shards: one thread stands for each actor, and hires another when it dies."""

    start: Callable[..., Pass]
    actors: int | None
    num_gpus: float | None
    num_cpus: float
    retries: int
    waiting: deque[Shard] = field(default_factory=deque)
    left: int = 1  # shards that are not finished; the planning itself counts as one
    images: int = 0
    problem: BaseException | None = None
    lost: Counter[str] = field(default_factory=Counter)  # actors, by what they did
    changed: Condition = field(default_factory=Condition)
    processes: list[Process] = field(default_factory=list)  # of the actors, dead ones too

    def run(self, plan: Callable[[], Plan]) -> None:
        """Write all that `plan` says is missing, once an actor has loaded the teacher; it needs the manifest."""
        if self.num_gpus is None:
            self.num_gpus = 1 if ray.cluster_resources().get("GPU") else 0
        first = self._hire()
        assert first is not None  # nobody else can end the work yet
        missing, self.images, description = plan()
        self.waiting, self.left = deque(missing), len(missing)
        with progress(total=self.images, description=description, unit="image") as self.bar:
            threads = [self._thread(first)]
            try:
                while not self.over:
                    while len(threads) < min(self._wanted(), self.left):
                        threads.append(self._thread())
                    self._wait(WAIT)
            except BaseException as error:  # a stop above all
                self._fail(error)
            for thread in threads:
                thread.join()
            for process in self.processes:  # so that what a killed actor leaves can be removed
                process.wait(POLL)
        if self.problem is not None:
            raise self.problem
        _look(plan)

    @property
    def over(self) -> bool:
        """Whether all shards are finished, or one cannot be."""
        return self.left == 0 or self.problem is not None

    def _wait(self, seconds: float) -> None:
        """Wait until the work is over, but no longer than `seconds`; Stopped if a stop was requested."""
        until = time.monotonic() + seconds
        with self.changed:
            while not self.changed.wait_for(lambda: self.over, POLL) and time.monotonic() < until:
                stop.check()

    def _wanted(self) -> int:
        if self.actors is not None:
            return self.actors
        held, each = ray.cluster_resources(), {"GPU": self.num_gpus, "CPU": self.num_cpus}
        return max(1, int(min(held.get(kind, 0) / need for kind, need in each.items() if need)))

    def _thread(self, actor: Any = None) -> Thread:
        thread = Thread(target=self._serve, args=(actor,), daemon=True)
        thread.start()
        return thread

    def _serve(self, actor: Any) -> None:
        try:
            while (actor := actor or self._hire()) and (shard := self._take()):
                if not self._write(actor, shard):
                    ray.kill(actor)  # it may be out of reach only
                    actor = None
        except BaseException as error:
            self._fail(error)
        finally:
            if actor:
                ray.kill(actor)

    def _hire(self) -> Any:
        """Return a new actor that has loaded the teacher, however long it takes; None where the work is over before."""
        loading = f"loading in thread {get_ident()}"
        while not self.over:
            options = {"num_gpus": self.num_gpus, "num_cpus": self.num_cpus, "scheduling_strategy": "SPREAD"}
            actor: Any = ray.remote(Caching).options(**options).remote(self.start, os.getcwd())
            loaded = actor.load.remote()
            try:
                if self._comes(loaded, f"an actor with {self.num_gpus:g} GPUs and {self.num_cpus:g} CPUs"):
                    self.processes.append(ray.get(loaded))
                    self.lost.pop(loading, None)
                    return actor
                ray.kill(actor)
            except RayTaskError as error:
                raise _cause(error) from error
            except RayError as error:
                ray.kill(actor)
                self._lose(loading, LOADING, error)
            stop.check()
        return None

    def _write(self, actor: Any, shard: Shard) -> bool:
        """Return whether `actor` finished the shard; where it died, the shard waits again."""
        seen, counts = 0, actor.write.options(num_returns="streaming").remote(shard, self.images)
        try:
            while self._comes(counts):
                images: Any = ray.get(next(counts))
                seen += images
                self._count(images)
        except StopIteration:
            self._count(0, finished=1)
        except RayTaskError as error:
            raise _cause(error) from error
        except RayError as error:
            self._lose(shard.name, shard.name, error)
            with self.changed:
                self.waiting.appendleft(shard)
                self.bar.update(-seen)
                self.changed.notify_all()
            return False
        return True

    def _comes(self, ref: Any, who: str = "") -> bool:
        """Wait for `ref`; return whether it came before the work was over."""
        began, told = time.monotonic(), not who
        while not ray.wait([ref], timeout=POLL)[0]:
            if self.over or stop.requested() is not None:
                return False
            if not told and time.monotonic() - began > WAIT:
                told = True
                log.warning("%s still loads its teacher, or the cluster has no place for it: see `ray status`", who)
        return True

    def _take(self) -> Shard | None:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.over)
            return None if self.over else self.waiting.popleft()

    def _count(self, images: int, finished: int = 0) -> None:
        with self.changed:
            self.bar.update(images)
            self.left -= finished
            self.changed.notify_all()

    def _lose(self, key: str, work: str, error: RayError) -> None:
        reason = " ".join(str(error).split())[:400]
        with self.changed:
            self.lost[key] += not (isinstance(error, RayActorError) and error.preempted)
            if self.lost[key] > self.retries:
                raise UserError(
                    f"{work}: {self.lost[key]} actors died of it, more than cache.executor.retries={self.retries}; "
                    f"where it was memory, lower teacher.batch; the last: {reason}"
                )
        log.warning("%s: the actor died, another one takes over: %s", work, reason)

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.problem = self.problem or error
            self.changed.notify_all()


def _cause(error: RayTaskError) -> BaseException:
    return error.cause if isinstance(error.cause, Exception) else error


def _look(plan: Callable[[], Plan]) -> None:
    """UserError where this machine does not see what the actors wrote; a network's folder may take a moment to."""
    for seconds in (0, 0.1 * WAIT, WAIT):
        time.sleep(seconds)
        missing = plan().missing
        if not missing:
            return
    raise UserError(
        f"{len(missing)} shards that actors wrote are not here, '{missing[0].name}' first; cache.root must be a folder "
        "that all machines share"
    )
