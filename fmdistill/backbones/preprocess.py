"""What turns an image into a network's input, by the name that a manifest holds."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from fmdistill.backbones.class_preprocess import ClassPreprocess
from fmdistill.backbones.clip import ClipPreprocess
from fmdistill.backbones.pixels import Picture
from fmdistill.backbones.sam import SamPreprocess
from fmdistill.registry import UserError, suggest


class Preprocess(Protocol):
    """An image's way into a network, in two halves: the first on the CPU, the second where the network is."""

    @property
    def image_size(self) -> int:
        """The side S of the square that the network sees."""
        ...

    @property
    def stride(self) -> int:
        """Pixels of a token's side; the grid has g = S / stride tokens a side."""
        ...

    def prepare(self, image: Picture) -> tuple[Tensor, tuple[int, int]]:
        """Return uint8 pixels (3, S, S) in RGB and the (h, w) of them that are real."""
        ...

    def normalize(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Return uint8 pixels (B, 3, S, S) as the network's float32 input."""
        ...

    def valid(self, sizes: Tensor) -> Tensor:
        """Return bool (B, g, g): a token is valid if it holds any real pixel."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return what determines the network's input, for a manifest."""
        ...


PREPROCESSING = {"sam": SamPreprocess, "clip": ClipPreprocess, "class": ClassPreprocess}


def from_json(stored: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing that a manifest describes."""
    name = str(stored.get("name"))
    if name not in PREPROCESSING:
        raise UserError(f"preprocessing '{name}': unknown.{suggest(name, PREPROCESSING)}")
    return PREPROCESSING[name].from_json(stored)
