"""The Ray actors that run the teacher, and the driver that assigns shards to them, also if actors start late or die.

Ray places, starts and monitors the actors. A shard whose actor died is assigned to the next free actor, because Ray's
own retry would tie it to a machine that may never return. Writing a shard is idempotent, so nothing has to be undone.
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
from fmdistill.cache.executors.processes import MissingShards
from fmdistill.cache.teacher_pass import Pass
from fmdistill.files import Process
from fmdistill.images import Shard
from fmdistill.logs import log, progress
from fmdistill.registry import UserError

POLL = 1.0  # seconds between checks whether the work is over
WAIT = 30.0  # seconds between checks whether the cluster has grown, and until a warning that an actor is waiting
LOADING = "loading the teacher"  # the work of an actor before its first shard


class TeacherActor:
    """A Ray actor that writes shards with a teacher, loaded by `load` so that errors reach the driver."""

    def __init__(self, start: Callable[..., Pass], folder: str) -> None:
        self.start = start
        if os.path.isdir(folder):  # the driver's working folder, to which a recipe's paths are relative
            os.chdir(folder)

    def load(self) -> Process:
        """Load the teacher and return this process. Raises UserError if the cache is of another teacher."""
        self.work = self.start()
        return Process.own()

    def write(self, shard: Shard, expected: int) -> Iterator[int]:
        """Write a shard, yielding the number of images of each batch when it is encoded."""
        self.work.expected = expected
        queue = _ProgressQueue()
        with ThreadPoolExecutor(1) as thread:
            written = thread.submit(self.work.run, [shard], queue)  # type: ignore[arg-type]
            written.add_done_callback(lambda _: queue.update(0))
            while (images := queue.counts.get()) or not written.done():
                yield images
            written.result()


class _ProgressQueue:
    """Takes the place of a progress bar and queues its updates for the driver."""

    def __init__(self) -> None:
        self.counts: SimpleQueue[int] = SimpleQueue()

    def update(self, images: int) -> None:
        """Add `images` to the queue."""
        self.counts.put(images)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Ignore the text, which is about this actor only and is in its log."""


@dataclass
class Driver:
    """Assigns the missing shards to actors; a thread controls each actor, and starts another if it dies."""

    start: Callable[..., Pass]
    actors: int | None
    num_gpus: float | None
    num_cpus: float
    retries: int
    waiting: deque[Shard] = field(default_factory=deque)
    unfinished: int = 1  # shards; the planning counts as one
    images: int = 0
    error: BaseException | None = None
    deaths: Counter[str] = field(default_factory=Counter)  # of actors, by their work
    changed: Condition = field(default_factory=Condition)
    processes: list[Process] = field(default_factory=list)  # of all actors, including dead ones

    def run(self, plan: Callable[[], MissingShards]) -> None:
        """Write the missing shards; `plan` is called once an actor has loaded the teacher and written the manifest."""
        if self.num_gpus is None:
            self.num_gpus = 1 if ray.cluster_resources().get("GPU") else 0
        first = self._start_actor()
        assert first is not None  # only returns None if the work is over
        missing, self.images, description = plan()
        self.waiting, self.unfinished = deque(missing), len(missing)
        with progress(total=self.images, description=description, unit="image") as self.bar:
            threads = [self._thread(first)]
            try:
                while not self.over:
                    while len(threads) < min(self._actor_limit(), self.unfinished):
                        threads.append(self._thread())
                    self._wait(WAIT)
            except BaseException as error:  # usually a stop
                self._fail(error)
            for thread in threads:
                thread.join()
            for process in self.processes:  # so that the temporary files of a killed actor can be removed
                process.wait(POLL)
        if self.error is not None:
            raise self.error
        _check_written(plan)

    @property
    def over(self) -> bool:
        """Whether all shards are finished, or an error ended the work."""
        return self.unfinished == 0 or self.error is not None

    def _wait(self, seconds: float) -> None:
        """Wait until the work is over, but at most `seconds`. Raises Stopped if a stop was requested."""
        until = time.monotonic() + seconds
        with self.changed:
            while not self.changed.wait_for(lambda: self.over, POLL) and time.monotonic() < until:
                stop.check()

    def _actor_limit(self) -> int:
        if self.actors is not None:
            return self.actors
        available, needs = ray.cluster_resources(), {"GPU": self.num_gpus, "CPU": self.num_cpus}
        return max(1, int(min(available.get(kind, 0) / need for kind, need in needs.items() if need)))

    def _thread(self, actor: Any = None) -> Thread:
        thread = Thread(target=self._serve, args=(actor,), daemon=True)
        thread.start()
        return thread

    def _serve(self, actor: Any) -> None:
        try:
            while (actor := actor or self._start_actor()) and (shard := self._take()):
                if not self._write(actor, shard):
                    ray.kill(actor)  # it may still be alive but unreachable
                    actor = None
        except BaseException as error:
            self._fail(error)
        finally:
            if actor:
                ray.kill(actor)

    def _start_actor(self) -> Any:
        """Start an actor, wait until it has loaded the teacher, and return it; None if the work is over before."""
        loading = f"loading in thread {get_ident()}"
        while not self.over:
            options = {"num_gpus": self.num_gpus, "num_cpus": self.num_cpus, "scheduling_strategy": "SPREAD"}
            actor: Any = ray.remote(TeacherActor).options(**options).remote(self.start, os.getcwd())
            loaded = actor.load.remote()
            try:
                if self._wait_for(loaded, f"an actor with {self.num_gpus:g} GPUs and {self.num_cpus:g} CPUs"):
                    self.processes.append(ray.get(loaded))
                    self.deaths.pop(loading, None)
                    return actor
                ray.kill(actor)
            except RayTaskError as error:
                raise _cause(error) from error
            except RayError as error:
                ray.kill(actor)
                self._record_death(loading, LOADING, error)
            stop.check()
        return None

    def _write(self, actor: Any, shard: Shard) -> bool:
        """Let `actor` write the shard; return whether it finished. If it died, the shard is waiting again."""
        seen, counts = 0, actor.write.options(num_returns="streaming").remote(shard, self.images)
        try:
            while self._wait_for(counts):
                images: Any = ray.get(next(counts))
                seen += images
                self._count(images)
        except StopIteration:
            self._count(0, finished=1)
        except RayTaskError as error:
            raise _cause(error) from error
        except RayError as error:
            self._record_death(shard.name, shard.name, error)
            with self.changed:
                self.waiting.appendleft(shard)
                self.bar.update(-seen)
                self.changed.notify_all()
            return False
        return True

    def _wait_for(self, ref: Any, who: str = "") -> bool:
        """Wait for `ref`; return False if the work was over before. If it takes long, warn about `who`."""
        began, warned = time.monotonic(), not who
        while not ray.wait([ref], timeout=POLL)[0]:
            if self.over or stop.requested() is not None:
                return False
            if not warned and time.monotonic() - began > WAIT:
                warned = True
                log.warning("%s still loads its teacher, or the cluster has no room for it: see `ray status`", who)
        return True

    def _take(self) -> Shard | None:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.over)
            return None if self.over else self.waiting.popleft()

    def _count(self, images: int, finished: int = 0) -> None:
        with self.changed:
            self.bar.update(images)
            self.unfinished -= finished
            self.changed.notify_all()

    def _record_death(self, key: str, work: str, error: RayError) -> None:
        """Count and log the death of an actor. Raises UserError if more than `retries` died of this work."""
        reason = " ".join(str(error).split())[:400]
        with self.changed:
            self.deaths[key] += not (isinstance(error, RayActorError) and error.preempted)
            if self.deaths[key] > self.retries:
                raise UserError(
                    f"{work}: {self.deaths[key]} actors died of it, more than cache.executor.retries={self.retries}; "
                    f"if memory was the reason, lower teacher.batch; the last error: {reason}"
                )
        log.warning("%s: the actor died, another one takes over: %s", work, reason)

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()


def _cause(error: RayTaskError) -> BaseException:
    return error.cause if isinstance(error.cause, Exception) else error


def _check_written(plan: Callable[[], MissingShards]) -> None:
    """Check that this machine sees the shards, which a network folder may delay. Raises UserError if not."""
    for seconds in (0, 0.1 * WAIT, WAIT):
        time.sleep(seconds)
        missing = plan().missing
        if not missing:
            return
    raise UserError(
        f"{len(missing)} shards that actors wrote are not in cache.root, first '{missing[0].name}'; cache.root must be "
        "a folder that all machines share"
    )
