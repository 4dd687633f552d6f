"""This process, alone or beside others in one folder, which a launcher or a person started."""

import os
from collections.abc import Callable
from typing import NamedTuple

from fmdistill.cache.teacher_pass import Pass, ours_first
from fmdistill.images import Images, Shard
from fmdistill.launcher import processes
from fmdistill.logs import log, progress
from fmdistill.registry import UserError


class Plan(NamedTuple):
    """The shards that are missing, how many images they hold, and what a progress bar says."""

    missing: list[Shard]
    images: int
    description: str


def local(images: Images, start: Callable[..., Pass], plan: Callable[[], Plan]) -> None:
    """Run the teacher in this process; those that torchrun or `accelerate launch` started share the shards by rank."""
    rank, world = processes()  # first, so that a wrong number is noticed before a teacher is loaded
    work = start(images)
    missing, work.expected, description = plan()
    if not missing:
        return
    held = set(missing)
    order = [shard for shard in ours_first(images.shards(), rank, world) if shard in held]
    with progress(total=work.expected, description=description, unit="image") as bar:
        work.run(order, bar)
    log.info("%s: %d images cached, %d skipped", work.store.folder, work.seen - work.failed, work.failed)


def accelerate(images: Images, start: Callable[..., Pass], plan: Callable[[], Plan]) -> None:
    """Run as `local` does in the processes of a launcher. UserError where no launcher started this one."""
    if not {"RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ):  # torchrun's, and accelerate's for one process
        raise UserError(
            "cache.executor.name=accelerate: no launcher started this process; start it as `accelerate launch -m "
            "fmdistill cache RECIPE ...`, or leave cache.executor.name=local"
        )
    local(images, start, plan)
