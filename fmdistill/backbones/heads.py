"""The small part of a teacher that is kept beside its outputs, by the teacher's family."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fmdistill.backbones.clip import TextHead
from fmdistill.backbones.linear_head import LinearHead
from fmdistill.backbones.promptable import PromptHead
from fmdistill.registry import UserError, suggest


class Head(Protocol):
    """What the cache asks of a head; what it does with an embedding is its family's own."""

    config: Any  # JSON: all that `load` needs beside the weights

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the head's weights by name."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write head.safetensors and head.json into `folder`."""
        ...

    @classmethod
    def load(cls, folder: str | Path) -> "Head":
        """Return the head that `save` wrote, in eval mode; UserError where it is missing or damaged."""
        ...


HEADS = {"sam": PromptHead, "clip": TextHead, "classifier": LinearHead}


def load_head(family: str, folder: str | Path) -> Any:
    """Return the head that was saved in `folder`, in eval mode; UserError where it is missing or damaged."""
    if family not in HEADS:
        raise UserError(f"{folder}: family '{family}' has no head.{suggest(family, HEADS)}")
    return HEADS[family].load(folder)
