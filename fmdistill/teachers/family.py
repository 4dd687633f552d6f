"""Define what a teacher family is: one record with all that the rest of the package needs to know about it."""

# Legend: B images, S the square's side, g = S / stride tokens a side, C channels, D a vector's width.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from fmdistill.backbones.pixels import Picture
from fmdistill.teachers.output import Output

Settings = Mapping[str, Any]  # a recipe's `teacher`


class Preprocess(Protocol):
    """Prepares images for a network in two halves: the first on the CPU, the second where the network is."""

    @property
    def image_size(self) -> int:
        """Return the side S of the square that the network sees."""
        ...

    @property
    def stride(self) -> int:
        """Return the pixels of a token's side; the grid has g = S / stride tokens a side."""
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


class Head(Protocol):
    """The small part of a teacher that is stored beside its outputs; how an embedding is used is up to its family."""

    config: Any  # JSON: all that `load` needs beside the weights

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the head's weights by name."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write head.safetensors and head.json into `folder`."""
        ...

    @classmethod
    def load(cls, folder: str | Path) -> "Head":
        """Return the head that `save` wrote, in eval mode; UserError if it is missing or damaged."""
        ...


class Teacher(Protocol):
    """A frozen model whose outputs are cached: it maps prepared images to named outputs."""

    family: str  # the name of its Family, and the prefix of its outputs
    batch: int  # images of one forward pass
    workers: int  # threads that decode images

    @property
    def preprocess(self) -> Preprocess:
        """Return what prepares its images; a student shares it."""
        ...

    @property
    def outputs(self) -> Mapping[str, Output]:
        """Return what it gives for one image, by name."""
        ...

    def __call__(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Map uint8 (B, 3, S, S) pixels and their (B, 2) sizes to float32 outputs on the CPU."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return all that the outputs depend on: weights, preprocessing, compute dtype and path."""
        ...

    def head(self) -> Head | None:
        """Return the small part that is stored beside the shards; None if the family has none."""
        ...


class JsonPreprocess(Protocol):
    """A class of preprocessing that a manifest's JSON opens."""

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Preprocess:
        """Return the preprocessing that `to_json` described; UserError for any other description."""
        ...


@dataclass(frozen=True)
class Reference:
    """The way from images to embeddings that a package's own README shows, with a teacher's weights, for benchmarks."""

    name: str
    embed: Callable[[Sequence[Image.Image]], Tensor]  # prepares and embeds; float32 (B, ...) on the CPU
    pixels: Callable[[bytes], Any]  # encoded bytes -> what its network takes
    flops: Callable[[], int]  # of its network for one image


def _no_file(settings: Settings) -> Path | None:
    return None


def _nothing_stated(settings: Settings, stored: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _no_reference(teacher: Any) -> Reference | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that the package knows about one kind of teacher.

    `teachers` are builders by the name that a recipe gives, or their "module:Name"; a recipe's settings are checked
    against their signatures. `preprocess` opens the JSON that a manifest stores, `head` the files beside the shards.
    """

    name: str  # the prefix of its outputs
    teachers: Mapping[str, Callable[..., Teacher] | str]
    preprocess: type[JsonPreprocess]
    head: type[Head] | None = None  # None if nothing is stored beside the shards
    pads: bool = False  # whether images are padded to the square, so that some tokens hold no real pixel
    map_setting: str | None = None  # the setting that asks for maps; None if every teacher of the family makes one
    # the file or folder that the settings name; None for packaged weights, downloads, and weights that are drawn
    weights_file: Callable[[Settings], Path | None] = _no_file
    # the part of the fingerprint that the settings state without the weights, given the fingerprint that is stored
    identity: Callable[[Settings, Mapping[str, Any]], dict[str, Any]] = _nothing_stated
    # the setting with which a teacher computes as a manifest says, by place and value in the manifest
    way_back: Mapping[tuple[str, str], str] = field(default_factory=dict)
    # the settings with weights that are drawn instead of read, given a folder for a checkpoint of them
    random_weights: Callable[[Settings, Path], dict[str, Any]] | None = None
    reference: Callable[[Any], Reference | None] = _no_reference

    def makes_maps(self, settings: Settings) -> bool:
        """Return whether the teacher of these settings makes a map of tokens, without loading it."""
        return self.map_setting is None or bool(settings.get(self.map_setting))


def pads(preprocess: Preprocess) -> bool:
    """Return whether some images are padded, so that not all of their tokens are valid."""
    return not bool(preprocess.valid(torch.tensor([[1, 1]])).all())
