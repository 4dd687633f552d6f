"""Crop the photographs that ship inside the scikit-image and scikit-learn wheels, for the source `photos`."""

import functools
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import PIL.Image

from fmdistill.images.numbered import check_counts, png, shard_names, shard_range
from fmdistill.images.source import Encoded
from fmdistill.registry import UserError

# Split by photograph: nothing trains on a crop or a texture of a validation photograph.
PHOTOGRAPHS = {
    "train": [
        "astronaut",
        "china",
        "motorcycle_left",
        "rocket",
        "camera",
        "brick",
        "grass",
        "gravel",
        "hubble_deep_field",
        "ihc",
        "moon",
        "retina",
    ],
    "validation": ["chelsea", "coffee", "flower", "coins"],
}
FOLDERS = (("skimage", "data"), ("sklearn", "datasets/images"))
# Crop side / largest side that fits, log-uniform; wider for training, which has only a dozen photographs.
ZOOM = {"train": (0.2, 1.0), "validation": (0.45, 1.0)}


@functools.cache
def photograph(name: str) -> np.ndarray:
    """Return a photograph as read-only uint8 (H, W, 3) RGB."""
    for package, folder in FOLDERS:
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for suffix in (".png", ".jpg"):
                path = Path(root, folder, name + suffix)
                if path.is_file():
                    with PIL.Image.open(path) as image:
                        pixels = np.array(image.convert("RGB"))
                    pixels.setflags(write=False)
                    return pixels
    raise UserError(
        f"photograph '{name}': in no data folder of scikit-image or scikit-learn; install scikit-image and scikit-learn"
    )


def frame(index: int, size: int) -> tuple[int, int]:
    """Return the (width, height) of image `index`: even ones are square, odd ones 3:2 and 2:3 in turn."""
    short = round(size * 2 / 3)
    return {1: (size, short), 3: (short, size)}.get(index % 4, (size, size))


@dataclass(frozen=True)
class Photos:
    """A source of random crops at several scales, PNG; half are square, half are 3:2 or 2:3 with long side `size`."""

    train: int = 192
    validation: int = 48
    size: int = 256  # pixels
    seed: int = 0
    shard_size: int = 32

    def __post_init__(self) -> None:
        """Check the settings."""
        check_counts("images", **asdict(self))

    def shards(self) -> dict[str, list[str]]:
        """Return the shard names by split."""
        return shard_names(self.train, self.validation, self.shard_size)

    def count(self, shard: str) -> int:
        """Return how many crops the shard holds."""
        return len(self.keys(shard))

    def read(self, shard: str) -> Iterator[Encoded]:
        """Yield the shard's crops in order."""
        for key in self.keys(shard):
            yield self._encode(key)

    def fetch(self, shard: str, key: str) -> Encoded:
        """Return one crop; KeyError if the shard holds no such key."""
        if key not in self.keys(shard):
            raise KeyError(key)
        return self._encode(key)

    def identity(self) -> dict:
        """Return all settings, the photographs of each split, and the range of the crops' sides."""
        return {"name": "photos", **asdict(self), "photographs": PHOTOGRAPHS, "zoom": ZOOM}

    def keys(self, shard: str) -> list[str]:
        """Return the shard's keys, in their order."""
        split, indices = shard_range(shard, self.train, self.validation, self.shard_size)
        names = PHOTOGRAPHS[split]
        return [f"{names[i % len(names)]}-{i // len(names):04d}" for i in indices]

    def _encode(self, key: str) -> Encoded:
        return Encoded(key, png(crop(key, self.size, self.seed)))


def crop(key: str, size: int, seed: int) -> PIL.Image.Image:
    """Return the crop named `key` ("photograph-0007"), a pure function of key, size and seed."""
    name, _, number = key.rpartition("-")
    # the photograph's index is added so that a few consecutive crops have all three shapes
    split, offset = next((split, names.index(name)) for split, names in PHOTOGRAPHS.items() if name in names)
    seeds = [seed, zlib.crc32(key.encode())]
    return cut(photograph(name), seeds, ZOOM[split], frame(int(number) + offset, size))


def cut(pixels: np.ndarray, seeds: list[int], zoom: tuple[float, float], shape: tuple[int, int]) -> PIL.Image.Image:
    """Return a random crop of a photograph (H, W, 3), resized to `shape` (width, height), half of them mirrored.

    `zoom` is the range of the crop's side, as a share of the largest that fits.
    """
    rng = np.random.default_rng(seeds)
    image = PIL.Image.fromarray(pixels)
    width, height = shape
    fit = min(image.width / width, image.height / height)
    scale = fit * np.exp(rng.uniform(*np.log(zoom)))
    left = rng.uniform(0, image.width - width * scale)
    top = rng.uniform(0, image.height - height * scale)
    box = (left, top, min(left + width * scale, image.width), min(top + height * scale, image.height))
    resized = image.resize(shape, PIL.Image.Resampling.BICUBIC, box=box)
    return resized.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else resized
