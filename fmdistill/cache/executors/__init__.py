"""Who runs the teacher over the missing shards: this process, those of a launcher, or the actors of a Ray cluster.

A shard is idempotent and published first-wins, so executors may be mixed in one folder, and a shard done twice. Each is
a function of `images`, `start` (gives the pass of this process, its teacher loaded) and `plan` (what is missing).
"""

import functools
from collections.abc import Mapping
from typing import Any

from fmdistill.cache.executors.processes import accelerate, local
from fmdistill.cache.executors.ray import ray_actors
from fmdistill.registry import bind

EXECUTORS = {"local": local, "accelerate": accelerate, "ray": ray_actors}


def check(settings: Mapping[str, Any]) -> functools.partial:
    """Return the executor that a recipe's `cache.executor` names, its settings bound, without starting anything."""
    return bind(settings, EXECUTORS, "cache.executor", context=("images", "start", "plan"))
