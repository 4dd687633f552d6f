"""Executors run the teacher over the missing shards, in this process, a launcher's processes or a Ray cluster's actors.

An executor is a function of `images`, of `start`, which loads the teacher and returns its pass, and of `plan`, which
returns the missing shards. Writing a shard is idempotent and the first published tar counts, so several executors may
write to one folder, even the same shard.
"""

import functools
from collections.abc import Mapping
from typing import Any

from fmdistill.cache.executors.processes import accelerate, local
from fmdistill.cache.executors.ray import ray_actors
from fmdistill.registry import bind

EXECUTORS = {"local": local, "accelerate": accelerate, "ray": ray_actors}


def check(settings: Mapping[str, Any]) -> functools.partial:
    """Check the settings of `cache.executor` and return the executor with them bound, without starting it."""
    return bind(settings, EXECUTORS, "cache.executor", context=("images", "start", "plan"))
