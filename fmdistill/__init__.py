"""fmdistill compresses foundation vision models: cache the teacher once, distil, evaluate, export.

The functions below are `fmdistill.api`'s, imported when they are first used; docs/python.md has examples.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmdistill.api import cache as cache
    from fmdistill.api import compare as compare
    from fmdistill.api import evaluate as evaluate
    from fmdistill.api import export as export
    from fmdistill.api import init as init
    from fmdistill.api import load as load
    from fmdistill.api import plan as plan
    from fmdistill.api import push as push
    from fmdistill.api import run as run

__version__ = "0.1.0"
__all__ = ["cache", "compare", "evaluate", "export", "init", "load", "plan", "push", "run"]
STAGES = ("cache", "evaluate", "export")  # functions whose names are also those of sub-packages


class _Stage(types.ModuleType):
    """A sub-package that is also a function: `fmdistill.cache(recipe)` calls `cache` of fmdistill.api."""

    @property
    def __signature__(self) -> Any:
        import inspect  # here, since it takes as long to import as the rest of this file

        return inspect.signature(self._function)

    @property
    def _function(self) -> Any:
        return getattr(importlib.import_module(f"{__package__}.api"), self.__name__.rpartition(".")[2])

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self._function(*arguments, **settings)


class _Package(types.ModuleType):
    """This package; Python stores each sub-package that it imports as an attribute, here made callable if a stage."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in STAGES and isinstance(value, types.ModuleType):
            value.__class__ = _Stage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in STAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
