"""The cache stage: images -> teacher -> shards. `run` does only what is missing.

A name is imported when it is first used, so that `finished` can tell whether a cache is complete without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmdistill.cache.reader import Cache
    from fmdistill.cache.stage import estimate, identity, load_teacher, open_cache, run, start, verify
    from fmdistill.cache.webdataset_pipeline import webdataset

__all__ = ["Cache", "estimate", "identity", "load_teacher", "open_cache", "run", "start", "verify", "webdataset"]
MODULES = {"Cache": "reader", "webdataset": "webdataset_pipeline"}  # of the others, "stage"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES.get(name, 'stage')}"), name)
