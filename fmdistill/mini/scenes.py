"""Generate the images of source `scenes`, whose objects and masks are known exactly.

Legend: H, W height and width; C = 3 colours in [0, 255].
"""

import io
import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageFilter

from fmdistill.images.numbered import Numbered, check_counts, png
from fmdistill.images.source import SPLITS, Encoded
from fmdistill.mini.drawing import colour, outline, rasterize, surface, texture
from fmdistill.mini.photos import frame
from fmdistill.registry import UserError


class Scene(NamedTuple):
    """One scene: uint8 (H, W, 3) RGB, and int16 (H, W) with the visible object 1..n at each pixel, 0 = background."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Scenes(Numbered):
    """A source of shapes on a background, PNG with `labels.png`: half square, half 3:2 or 2:3 with long side `size`."""

    train: int = 256
    validation: int = 64
    size: int = 256  # pixels
    seed: int = 0
    shard_size: int = 32
    objects: tuple[int, int] = (3, 12)  # fewest and most drawn, uniform
    area: tuple[float, float] = (0.001, 0.25)  # of the image before occlusion, log-uniform
    occlusion: float = 0.5  # share of objects placed on the edge of an earlier one; the others are placed apart
    disorder: float = 0.7  # standard deviation, in log area, of the painter's order from large to small
    min_visible: int = 12  # pixels; an object with fewer left is painted but not labelled
    low_contrast: float = 0.15  # share of objects whose colour is 12 to 28 levels from the colour beneath
    textured: float = 0.6  # share of objects with photographic texture
    photo_background: float = 0.35  # share of backgrounds that are an unchanged photograph
    illumination: float = 0.3  # largest relative change of brightness from the centre to an edge
    blur: float = 0.8  # largest standard deviation, pixels
    noise: float = 6.0  # largest standard deviation, levels

    def __post_init__(self) -> None:
        """Check the settings."""
        names = ("train", "validation", "size", "seed", "shard_size", "min_visible")
        check_counts("images", **{name: getattr(self, name) for name in names})
        if not 1 <= self.objects[0] <= self.objects[1] <= 255:
            raise UserError(f"images.objects={self.objects}: expected fewest <= most, both from 1 to 255")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise UserError(f"images.area={self.area}: expected smallest <= largest, both above 0 and at most 1")
        for name in ("occlusion", "low_contrast", "textured", "photo_background", "illumination"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"images.{name}={getattr(self, name)}: expected a share from 0 to 1")
        for name in ("disorder", "blur", "noise"):
            if getattr(self, name) < 0:
                raise UserError(f"images.{name}={getattr(self, name)}: expected 0 or more")

    def identity(self) -> dict:
        """Return all settings."""
        return {"name": "scenes", **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}

    def key(self, split: str, index: int) -> str:
        """Return the key of image `index` of a split."""
        return f"scene-{split}-{index:06d}"

    def encode(self, split: str, index: int) -> Encoded:
        """Return image `index` of a split."""
        scene = draw(self, split, index)
        labels = png(PIL.Image.fromarray(scene.labels.astype(np.uint8)))
        return Encoded(self.key(split, index), png(PIL.Image.fromarray(scene.pixels)), extra={"labels.png": labels})


def decode_labels(data: bytes) -> np.ndarray:
    """Return the labels int16 (H, W) of a `labels.png`."""
    with PIL.Image.open(io.BytesIO(data)) as image:
        return np.array(image, dtype=np.int16)


def visible_areas(labels: np.ndarray) -> np.ndarray:
    """Return each object's visible share of the image, float64 (n,), object 1 first."""
    return np.bincount(labels.ravel())[1:] / labels.size


def draw(scenes: Scenes, split: str, index: int) -> Scene:
    """Return scene `index` >= 0 of a split, even beyond its count: a pure function of settings, split and index."""
    rng = np.random.default_rng([scenes.seed, SPLITS.index(split), index])
    width, height = frame(index, scenes.size)
    canvas = _background(scenes, rng, (width, height))
    labels = np.zeros((height, width), np.int16)
    count = int(rng.integers(scenes.objects[0], scenes.objects[1] + 1))
    areas = np.exp(rng.uniform(math.log(scenes.area[0]), math.log(scenes.area[1]), count)) * width * height
    order = np.argsort(-np.log(areas) + rng.normal(0, scenes.disorder, count))
    placed: list[tuple[np.ndarray, float]] = []  # centre and radius of a disc of the same area
    for number, area in enumerate(areas[order], start=1):
        centre = _place(scenes, rng, labels, placed, float(area))
        placed.append((centre, float(np.sqrt(area / np.pi))))
        drawn = rasterize([curve + centre for curve in outline(rng, float(area))], (width, height))
        if drawn is not None:
            box, coverage = drawn
            _paint(scenes, rng, canvas[box], coverage)
            labels[box][coverage >= 128] = number
    return Scene(_expose(scenes, rng, canvas), _visible(labels, scenes.min_visible))


def _background(scenes: Scenes, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    if rng.random() < scenes.photo_background:
        return texture(rng, size, (0.4, 2.0))
    base = colour(rng, rng.uniform(0, 255, 3), (0, 255))
    rough = float(rng.uniform(4, 30)) if rng.random() < scenes.textured else 0.0
    return surface(rng, size, base, rough, shading=0.3)


def _place(
    scenes: Scenes, rng: np.random.Generator, labels: np.ndarray, placed: list[tuple[np.ndarray, float]], area: float
) -> np.ndarray:
    height, width = labels.shape
    if placed and rng.random() < scenes.occlusion:
        centre, radius = placed[rng.integers(len(placed))]
        turn = rng.uniform(0, 2 * np.pi)
        edge = centre + radius * np.array([np.cos(turn), np.sin(turn)])
        return np.clip(edge, 0, [width, height])
    radius = np.sqrt(area / np.pi)
    covered, candidates = [], rng.uniform(0, [width, height], (5, 2))
    for x, y in candidates:
        rows = slice(max(int(y - radius), 0), int(y + radius) + 1, 2)
        columns = slice(max(int(x - radius), 0), int(x + radius) + 1, 2)
        covered.append((labels[rows, columns] > 0).mean())
    return candidates[int(np.argmin(covered))]


def _paint(scenes: Scenes, rng: np.random.Generator, region: np.ndarray, coverage: np.ndarray) -> None:
    alpha_HW = coverage * np.float32(1 / 255)
    # einsum, not a BLAS product: its sum does not depend on the number of threads, so neither do the bytes
    beneath = np.einsum("hw,hwc->c", alpha_HW, region) / max(float(alpha_HW.sum()), 1e-3)
    faint = rng.random() < scenes.low_contrast
    base = colour(rng, beneath, (12, 28) if faint else (50, 255))
    rough = float(rng.uniform(3, 10 if faint else 32)) if rng.random() < scenes.textured else 0.0
    painted = surface(rng, (coverage.shape[1], coverage.shape[0]), base, rough, shading=0.05 if faint else 0.2)
    painted -= region
    painted *= alpha_HW[:, :, None]
    region += painted


def _expose(scenes: Scenes, rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    height, width = canvas.shape[:2]
    across, down = rng.uniform(-0.5, 0.5, 2) * scenes.illumination
    light_HW = (
        1
        + np.linspace(-across, across, width, dtype=np.float32)[None]
        + np.linspace(-down, down, height, dtype=np.float32)[:, None]
    )
    canvas *= light_HW[:, :, None]
    image = PIL.Image.fromarray(np.clip(canvas, 0, 255, out=canvas).astype(np.uint8))
    sigma = rng.uniform(0, scenes.blur)
    # a box has standard deviation sqrt(((2 radius + 1)^2 - 1) / 12)
    image = image.filter(PIL.ImageFilter.BoxBlur((math.sqrt(12 * sigma**2 + 1) - 1) / 2))
    # the sum of two bytes is near enough to a normal, at a third of its time
    bytes_2HWC = rng.integers(0, 256, (2, *canvas.shape), dtype=np.uint8)
    grain = np.add(bytes_2HWC[0], bytes_2HWC[1], dtype=np.float32)
    grain -= 255
    grain *= np.float32(rng.uniform(0, scenes.noise) / 104.5)  # sqrt(2 (256^2 - 1) / 12)
    grain += np.asarray(image)
    grain += 0.5
    return np.clip(grain, 0, 255, out=grain).astype(np.uint8)


def _visible(labels: np.ndarray, least: int) -> np.ndarray:
    counts = np.bincount(labels.ravel())
    large = counts >= max(least, 1)
    large[0] = False
    return np.where(large, np.cumsum(large), 0).astype(np.int16)[labels]
