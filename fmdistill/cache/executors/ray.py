"""The actors of a Ray cluster: where the cluster is, and what each actor takes of it."""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from fmdistill import stop
from fmdistill.cache.executors.processes import Plan
from fmdistill.cache.teacher_pass import Pass
from fmdistill.images import Images
from fmdistill.launcher import processes
from fmdistill.registry import UserError

STORE = 100 << 20  # bytes of the object store of a cluster of our own; nothing but counts travels


def ray_actors(
    images: Images,
    start: Callable[..., Pass],
    plan: Callable[[], Plan],
    actors: int | None = None,
    address: str = "auto",
    num_gpus: float | None = None,
    num_cpus: float = 1,
    retries: int = 3,
) -> None:
    """Run the teacher in `actors` of the cluster at `address`: "auto" a running one, "local" one of this machine alone.

    Without a number of actors there are as many as fit, also when the cluster grows. `num_gpus` and `num_cpus` are each
    actor's (one GPU where the cluster has any). A shard may lose `retries` actors beside those of preempted nodes.
    """
    if (actors is not None and actors < 1) or min(num_gpus or 0, num_cpus, retries) < 0 or not (num_gpus or num_cpus):
        raise UserError(
            f"cache.executor: actors={actors}, num_gpus={num_gpus}, num_cpus={num_cpus}, retries={retries}: expected "
            "an actor or more (null: as many as fit), each with something of a GPU or CPU, and 0 retries or more"
        )
    if processes()[1] > 1:
        raise UserError(
            "cache.executor.name=ray: a launcher started several processes, and each would start actors; run "
            "`fmdistill cache RECIPE` by itself first, or set cache.executor.name=local"
        )
    try:
        import ray  # noqa: F401  (a second to load, and an extra)
    except ImportError:
        raise UserError("cache.executor.name=ray: Ray is not installed; pip install 'fmdistill[ray]'") from None
    from fmdistill.cache.executors.ray_driver import Driver

    with _cluster(address):
        Driver(start, actors, num_gpus, num_cpus, retries).run(plan)


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    """Connect to the cluster at `address` for the block, unless the caller has connected to one."""
    import ray

    if ray.is_initialized():
        yield
        return
    own = {"include_dashboard": False, "object_store_memory": STORE} if address == "local" else {}
    if own:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that lives as long as this process is no news
    logging.getLogger("ray._private.worker").addFilter(_no_word_of_sigterm)
    # In the main thread Ray would take SIGTERM for itself, and exit by it. The thread lasts as long as the block, since
    # the processes of a cluster of our own die with the thread that started them.
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(ray.init, address=address, logging_level=logging.WARNING, **own).result()
        except (ConnectionError, ValueError) as error:  # the latter for what is no address
            raise UserError(
                f"cache.executor.address={address}: no Ray cluster there ({' '.join(str(error).split())}); start one "
                "with `ray start --head`, or use this machine alone with cache.executor.address=local"
            ) from None
        try:
            stop.check()
            yield
        finally:
            ray.shutdown()


def _no_word_of_sigterm(record: logging.LogRecord) -> bool:
    return "SIGTERM handler is not set" not in record.getMessage()
