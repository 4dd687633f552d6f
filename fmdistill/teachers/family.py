"""Define a teacher family: one record with everything that the rest of the package needs to know about it."""

# Legend: B images, S the square's side, g = S / stride tokens per side, C channels, D a vector's width.

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
    """Prepares images for a network in two halves: the first on the CPU, the second on the network's device."""

    @property
    def image_size(self) -> int:
        """Return the side S of the square that the network sees."""
        ...

    @property
    def stride(self) -> int:
        """Return the side of a token in pixels; the grid has g = S / stride tokens per side."""
        ...

    def prepare(self, image: Picture) -> tuple[Tensor, tuple[int, int]]:
        """Return uint8 pixels (3, S, S) in RGB and the size (h, w) of the part that is not padding."""
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
    """The small part of a teacher that is stored beside its outputs; its family defines how embeddings use it."""

    config: Any  # JSON: the settings that `load` needs in addition to the weights

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the head's weights by name."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write head.safetensors and head.json into `folder`."""
        ...

    @classmethod
    def load(cls, folder: str | Path) -> "Head":
        """Return the head that `save` wrote, in eval mode. Raises UserError if it is missing or damaged."""
        ...


class Teacher(Protocol):
    """A frozen model whose outputs are cached: it maps prepared images to named outputs."""

    family: str  # the name of its Family, and the prefix of its outputs
    batch: int  # images of one forward pass
    workers: int  # threads that decode images

    @property
    def preprocess(self) -> Preprocess:
        """Return the preprocessing of its images, which a student shares."""
        ...

    @property
    def outputs(self) -> Mapping[str, Output]:
        """Return a description of each of its outputs for one image, by name.

        A teacher with `captions` and `encode_captions` (`fmdistill.cache.captions.TextTeacher`) lists those too.
        """
        ...

    def __call__(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Map uint8 (B, 3, S, S) pixels and their (B, 2) sizes to float32 outputs on the CPU."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that the outputs depend on: weights, preprocessing, compute dtype and code path."""
        ...

    def head(self) -> Head | None:
        """Return the small part that is stored beside the shards; None if the family has none."""
        ...


class JsonPreprocess(Protocol):
    """A preprocessing class that can be restored from a manifest's JSON."""

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Preprocess:
        """Return the preprocessing that `to_json` described. Raises UserError for any other description."""
        ...


@dataclass(frozen=True)
class Reference:
    """Another package's own code from images to embeddings, with a teacher's weights, for benchmarks."""

    name: str
    embed: Callable[[Sequence[Image.Image]], Tensor]  # prepares and embeds; float32 (B, ...) on the CPU
    pixels: Callable[[bytes], Any]  # encoded bytes -> the network's input
    flops: Callable[[], int]  # of the network for one image


def weights_setting(settings: Settings) -> Path | None:
    """Return the file or run that the setting `weights` names; None for packaged weights or none."""
    weights = settings.get("weights")
    return Path(weights) if isinstance(weights, str) and weights not in ("", "none", "packaged") else None


def _no_file(settings: Settings) -> Path | None:
    return None


def _nothing_stated(settings: Settings, stored: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _no_reference(teacher: Any) -> Reference | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything the package knows about one kind of teacher.

    `teachers` maps the names used in recipes to builders, or to their "module:Name"; a recipe's settings are checked
    against their signatures. `preprocess` restores the preprocessing from the JSON in a manifest, and `head` the head
    from the files beside the shards.
    """

    name: str  # the prefix of its outputs
    teachers: Mapping[str, Callable[..., Teacher] | str]
    preprocess: type[JsonPreprocess]
    head: type[Head] | None = None  # None if nothing is stored beside the shards
    pads: bool = False  # whether images are padded to the square, so that some tokens hold no real pixel
    map_setting: str | None = None  # the setting that requests maps; None if every teacher of the family makes one
    # Returns the weights' file or folder that the settings name; None for packaged, downloaded and random weights.
    weights_file: Callable[[Settings], Path | None] = _no_file
    # Returns the part of the fingerprint that follows from the settings alone, given the stored fingerprint.
    identity: Callable[[Settings, Mapping[str, Any]], dict[str, Any]] = _nothing_stated
    # For a key and value in a manifest, the setting with which a teacher computes in the same way.
    matching_settings: Mapping[tuple[str, str], str] = field(default_factory=dict)
    # Returns the settings with random weights, which may be saved in the folder.
    random_weights: Callable[[Settings, Path], dict[str, Any]] | None = None
    reference: Callable[[Any], Reference | None] = _no_reference

    def makes_maps(self, settings: Settings) -> bool:
        """Return whether the teacher with these settings makes a map of tokens, without loading it."""
        return self.map_setting is None or bool(settings.get(self.map_setting))


def pads(preprocess: Preprocess) -> bool:
    """Return whether `preprocess` pads some images, so that not all of their tokens are valid."""
    return not bool(preprocess.valid(torch.tensor([[1, 1]])).all())
