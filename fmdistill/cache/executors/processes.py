"""Executors `local` and `accelerate`: run the teacher in this process, or in each process of a launcher."""

import os
from collections.abc import Callable
from typing import NamedTuple

from fmdistill.cache.teacher_pass import Pass, own_shards_first
from fmdistill.images import Images, Shard
from fmdistill.launcher import processes
from fmdistill.logs import log, progress
from fmdistill.registry import UserError


class MissingShards(NamedTuple):
    """The shards to write, the number of their images, and the description for a progress bar."""

    missing: list[Shard]
    images: int
    description: str


def local(images: Images, start: Callable[..., Pass], plan: Callable[[], MissingShards]) -> None:
    """Run the teacher in this process; the processes of torchrun or `accelerate launch` divide the shards by rank."""
    rank, world = processes()  # first, so that a wrong variable raises before the teacher is loaded
    work = start(images)
    missing, work.expected, description = plan()
    if not missing:
        return
    left = set(missing)
    order = [shard for shard in own_shards_first(images.shards(), rank, world) if shard in left]
    with progress(total=work.expected, description=description, unit="image") as bar:
        work.run(order, bar)
    log.info("%s: %d images cached, %d skipped", work.store.folder, work.seen - work.failed, work.failed)


def accelerate(images: Images, start: Callable[..., Pass], plan: Callable[[], MissingShards]) -> None:
    """Run like `local` in the processes of a launcher. Raises UserError if no launcher started this process."""
    if not {"RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ):  # accelerate sets only the latter for one process
        raise UserError(
            "cache.executor.name=accelerate: no launcher started this process; start it as `accelerate launch -m "
            "fmdistill cache RECIPE ...`, or leave cache.executor.name=local"
        )
    local(images, start, plan)
