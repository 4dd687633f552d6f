"""Executor `ray`: run the teacher in the actors of a Ray cluster."""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from fmdistill import stop
from fmdistill.cache.executors.processes import MissingShards
from fmdistill.cache.teacher_pass import Pass
from fmdistill.images import Images
from fmdistill.launcher import processes
from fmdistill.registry import UserError

STORE = 100 << 20  # bytes of the object store of a local cluster, which only carries counts


def ray_actors(
    images: Images,
    start: Callable[..., Pass],
    plan: Callable[[], MissingShards],
    actors: int | None = None,
    address: str = "auto",
    num_gpus: float | None = None,
    num_cpus: float = 1,
    retries: int = 3,
) -> None:
    """Run the teacher in `actors` of the Ray cluster at `address`.

    `address` may be "auto" for a running cluster, or "local" to start one on this machine. Without a number of actors,
    as many run as fit, also when the cluster grows. `num_gpus` and `num_cpus` are those of each actor (default: one GPU
    if the cluster has GPUs). A shard may lose up to `retries` actors, not counting those on preempted nodes.
    """
    if (actors is not None and actors < 1) or min(num_gpus or 0, num_cpus, retries) < 0 or not (num_gpus or num_cpus):
        raise UserError(
            f"cache.executor: actors={actors}, num_gpus={num_gpus}, num_cpus={num_cpus}, retries={retries}: expected "
            "1 actor or more (null: as many as fit), a part of a GPU or CPU for each, and 0 retries or more"
        )
    if processes()[1] > 1:
        raise UserError(
            "cache.executor.name=ray: a launcher started several processes, and each would start actors; first run "
            "`fmdistill cache RECIPE` without a launcher, or set cache.executor.name=local"
        )
    try:
        import ray  # noqa: F401  (an optional dependency that takes a second to import)
    except ImportError:
        raise UserError("cache.executor.name=ray: Ray is not installed; pip install 'fmdistill[ray]'") from None
    from fmdistill.cache.executors.ray_driver import Driver

    with _cluster(address):
        Driver(start, actors, num_gpus, num_cpus, retries).run(plan)


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    """Connect to the cluster at `address` for the block, unless this process is already connected to a cluster."""
    import ray

    if ray.is_initialized():
        yield
        return
    options = {"include_dashboard": False, "object_store_memory": STORE} if address == "local" else {}
    if options:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends no statistics about so short-lived a cluster
    logging.getLogger("ray._private.worker").addFilter(_is_not_about_sigterm)
    # In the main thread, Ray would handle SIGTERM and exit. The thread lasts as long as the block, since the processes
    # of a local cluster end with the thread that started them.
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(ray.init, address=address, logging_level=logging.WARNING, **options).result()
        except (ConnectionError, ValueError) as error:  # ValueError if the address is malformed
            raise UserError(
                f"cache.executor.address={address}: no Ray cluster at this address ({' '.join(str(error).split())}); "
                "start one with `ray start --head`, or use only this machine with cache.executor.address=local"
            ) from None
        try:
            stop.check()
            yield
        finally:
            with stop.restored():  # Ray's core resets SIGTERM to its default action, which would end this process
                ray.shutdown()


def _is_not_about_sigterm(record: logging.LogRecord) -> bool:
    return "SIGTERM handler is not set" not in record.getMessage()
