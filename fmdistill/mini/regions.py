"""Crop photographs and divide them into regions by colour and texture, for the source `regions`."""

import functools
import math
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from fmdistill.images.folder import image_paths
from fmdistill.images.numbered import Numbered, check_counts, png
from fmdistill.images.picture import DecodeError, decode
from fmdistill.images.source import Encoded
from fmdistill.mini import photos
from fmdistill.registry import UserError

LONGEST = 1600  # pixels; larger photographs are reduced to this side when they are opened


def segment(pixels: np.ndarray, scale: float, sigma: float, smallest: int) -> np.ndarray:
    """Return the regions 1..n of uint8 (H, W, 3) pixels, int16 (H, W), after Felzenszwalb & Huttenlocher 2004.

    A larger `scale` gives larger regions; `sigma` is the width of the smoothing before and `smallest` the least size
    of a region, both in pixels.
    """
    from skimage.segmentation import felzenszwalb

    regions = felzenszwalb(pixels, scale=scale, sigma=sigma, min_size=smallest)
    return (regions + 1).astype(np.int16)


@dataclass(frozen=True)
class Regions(Numbered):
    """A source of crops of photographs, PNG with `labels.png`, the region of each pixel; no pixel is background.

    Scale, smoothing and least size of the regions are drawn for each crop, so that one place of a photograph belongs
    to regions of several sizes. The photographs are those of the source `photos`, which belong to one split each, and
    for training those in `folder` and its subfolders too.
    """

    train: int = 192
    validation: int = 48
    size: int = 256  # pixels, long side
    seed: int = 0
    shard_size: int = 32
    folder: str | None = None  # photographs added to the training split
    scale: tuple[float, float] = (80.0, 1500.0)  # smallest and largest, log-uniform
    smallest: tuple[float, float] = (40.0, 800.0)  # pixels: the least size of a region, log-uniform
    sigma: tuple[float, float] = (0.7, 1.6)  # pixels, uniform

    def __post_init__(self) -> None:
        """Check the settings."""
        names = ("train", "validation", "size", "seed", "shard_size")
        check_counts("images", **{name: getattr(self, name) for name in names})
        for name in ("scale", "smallest", "sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"images.{name}={[low, high]}: expected smallest <= largest, both above 0")

    def identity(self) -> dict:
        """Return all settings and the names of the photographs."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"name": "regions", **settings, "photographs": {split: self._names(split) for split in photos.ZOOM}}

    def key(self, split: str, index: int) -> str:
        """Return the key of image `index` of a split."""
        return f"regions-{split}-{index:06d}"

    def encode(self, split: str, index: int) -> Encoded:
        """Return image `index` of a split; consecutive ones are of different photographs."""
        names = self._names(split)
        number, turn = index % len(names), index // len(names)
        seeds = [self.seed, zlib.crc32(names[number].encode()), turn]
        shape = photos.frame(turn + number, self.size)
        is_packaged = number < len(photos.PHOTOGRAPHS[split])
        pixels = photos.photograph(names[number]) if is_packaged else open_photograph(self.folder or "", names[number])
        image = photos.cut(pixels, seeds, photos.ZOOM[split], shape)
        rng = np.random.default_rng([*seeds, 1])
        scale, smallest = (math.exp(rng.uniform(*np.log(limits))) for limits in (self.scale, self.smallest))
        regions = segment(np.asarray(image), scale, rng.uniform(*self.sigma), round(smallest))
        labels = png(PIL.Image.fromarray(regions.astype(np.uint16)))
        return Encoded(self.key(split, index), png(image), extra={"labels.png": labels})

    def _names(self, split: str) -> list[str]:
        added = folder_photographs(self.folder, "images.folder") if self.folder and split == "train" else []
        return [*photos.PHOTOGRAPHS[split], *added]


@functools.cache
def folder_photographs(folder: str, where: str) -> list[str]:
    """Return the paths of the photographs below a folder, relative to it, in order; errors as for `image_paths`."""
    return sorted(image_paths(Path(folder).expanduser(), where))


@functools.cache
def open_photograph(folder: str, name: str) -> np.ndarray:
    """Return a photograph of a folder as uint8 (H, W, 3) RGB, reduced to `LONGEST` pixels on its long side."""
    path = Path(folder).expanduser() / name
    try:
        image = PIL.Image.fromarray(decode(path.read_bytes()))
    except DecodeError as error:
        raise UserError(f"{path}: cannot be decoded: {error}; repair or remove it") from None
    image.thumbnail((LONGEST, LONGEST))
    return np.array(image)
