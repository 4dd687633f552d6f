"""Define a job: what the engine trains, and the data that it trains and validates on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from fmdistill.cache.batch import Data
from fmdistill.distill.train import Complete, Shared


@dataclass(frozen=True)
class Job:
    """A task and the data that it trains and validates on."""

    task: nn.Module  # forward(batch) -> {"loss": scalar, name: scalar, ...}
    student: nn.Module  # the part of the task that a run keeps
    train: Data
    validation: Data
    shared: Shared | None = None  # what of a batch the whole optimizer step shares, (B, ...) each; None = nothing
    complete: Complete | None = None  # adds to a batch what the data lack, such as a live teacher's outputs
    finish: Callable[[], None] | None = None  # what is done to the trained student before it is saved
    parts: Mapping[str, "Job"] = field(default_factory=dict)  # by teacher, if there are several
