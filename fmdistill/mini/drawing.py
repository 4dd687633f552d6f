"""Draw the parts of generated images: outlines, anti-aliased masks, colours and surfaces with photographic texture.

Legend: H, W height and width; C = 3 colours in [0, 255]; V vertices; 2 = (x, y) in pixels.
"""

import functools

import numpy as np
import PIL.Image
import PIL.ImageDraw

from fmdistill.mini.photos import PHOTOGRAPHS, photograph

SUPERSAMPLE = 2
TEXTURES = PHOTOGRAPHS["train"]  # for validation scenes too: a validation photograph is never seen before it is judged


def ellipse(rng: np.random.Generator) -> list[np.ndarray]:
    """Return an ellipse with axes up to 1:2.2."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return [np.stack([np.cos(angle) * rng.uniform(1, 2.2), np.sin(angle)], axis=1)]


def ring(rng: np.random.Generator) -> list[np.ndarray]:
    """Return an ellipse with a hole that leaves between a third and three quarters of its width."""
    (outer,) = ellipse(rng)
    return [outer, outer * rng.uniform(0.35, 0.65)]


def rectangle(rng: np.random.Generator) -> list[np.ndarray]:
    """Return a rectangle with sides up to 1:2.5."""
    return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [rng.uniform(1, 2.5), 1]]


def bar(rng: np.random.Generator) -> list[np.ndarray]:
    """Return a thin bar, sides 1:3 to 1:8, tapered."""
    taper = rng.uniform(0.5, 1)
    return [np.array([[-1, -1], [1, -taper], [1, taper], [-1, 1]]) * [rng.uniform(3, 8), 1]]


def polygon(rng: np.random.Generator) -> list[np.ndarray]:
    """Return an irregular polygon of 3 to 8 corners, star-shaped about its centre."""
    corners = rng.integers(3, 9)
    angle = (np.arange(corners) + rng.uniform(-0.35, 0.35, corners)) * 2 * np.pi / corners
    return [_polar(angle, rng.uniform(0.55, 1.2, corners))]


def star(rng: np.random.Generator) -> list[np.ndarray]:
    """Return a star of 4 to 8 tips."""
    tips = rng.integers(4, 9)
    radius = np.where(np.arange(2 * tips) % 2 == 0, 1.0, rng.uniform(0.4, 0.7))
    return [_polar(np.arange(2 * tips) * np.pi / tips, radius)]


def blob(rng: np.random.Generator) -> list[np.ndarray]:
    """Return a smooth closed curve: a circle whose radius has four random harmonics."""
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    order = np.arange(2, 6)[:, None]
    waves = np.cos(order * angle + rng.uniform(0, 2 * np.pi, (4, 1))) * rng.uniform(0, 0.55, (4, 1)) / order**0.7
    return [_polar(angle, np.maximum(1 + waves.sum(axis=0), 0.25))]


SHAPES = {
    "blob": blob,
    "ellipse": ellipse,
    "polygon": polygon,
    "rectangle": rectangle,
    "bar": bar,
    "ring": ring,
    "star": star,
}
SHARES = (0.3, 0.17, 0.2, 0.13, 0.08, 0.06, 0.06)  # of SHAPES, in order


def outline(rng: np.random.Generator, area: float) -> list[np.ndarray]:
    """Return a random shape's closed curves (V, 2) about the origin enclosing `area` px^2; the second is a hole."""
    shape = list(SHAPES.values())[int(np.searchsorted(np.cumsum(SHARES)[:-1], rng.random(), side="right"))]
    curves = shape(rng)
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    enclosed = _area(curves[0]) - sum(_area(hole) for hole in curves[1:])
    return [curve @ rotation * np.sqrt(area / enclosed) for curve in curves]


def rasterize(curves: list[np.ndarray], frame: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray] | None:
    """Return the bounding box in a (W, H) frame and the coverage uint8 (h, w) inside it; None if it lies outside."""
    low, high = np.floor(curves[0].min(axis=0)), np.ceil(curves[0].max(axis=0))
    left, top = (max(int(v), 0) for v in low)
    right, bottom = (min(int(v), limit) for v, limit in zip(high, frame, strict=True))
    if right <= left or bottom <= top:
        return None
    canvas = PIL.Image.new("L", ((right - left) * SUPERSAMPLE, (bottom - top) * SUPERSAMPLE))
    pen = PIL.ImageDraw.Draw(canvas)
    for curve, fill in zip(curves, (255, 0), strict=False):
        # PIL's coordinates name pixel centres
        points = (curve - [left, top]) * SUPERSAMPLE - 0.5
        pen.polygon(points.ravel().tolist(), fill=fill)
    return (slice(top, bottom), slice(left, right)), np.asarray(canvas.reduce(SUPERSAMPLE))


def colour(rng: np.random.Generator, beneath_C: np.ndarray, distance: tuple[float, float]) -> np.ndarray:
    """Return a colour (C,) whose Euclidean distance from `beneath_C` lies in `distance` (levels) or close to it."""
    photo = photograph(TEXTURES[rng.integers(len(TEXTURES))])
    natural = photo[rng.integers(photo.shape[0]), rng.integers(photo.shape[1])].astype(np.float32)
    chosen = natural if rng.random() < 0.5 else rng.uniform(0, 255, 3).astype(np.float32)
    away = chosen - beneath_C
    length = float(np.linalg.norm(away))
    if length < 1:
        away, length = np.where(beneath_C > 127, -1.0, 1.0), 3**0.5
    moved = beneath_C + away * (np.clip(length, *distance) / length)
    # a colour outside the range would be clipped towards the colour beneath it: move it the other way instead
    outside = (moved < 0) | (moved > 255)
    return np.clip(np.where(outside, 2 * beneath_C - moved, moved), 0, 255).astype(np.float32)


def texture(rng: np.random.Generator, size: tuple[int, int], zoom: tuple[float, float]) -> np.ndarray:
    """Return a crop (h, w, C) float32 of a train photograph for a (w, h) `size`; `zoom` is source px per pixel."""
    photo = _image(TEXTURES[rng.integers(len(TEXTURES))])
    scale = np.exp(rng.uniform(*np.log(zoom)))
    width, height = min(size[0] * scale, photo.width), min(size[1] * scale, photo.height)
    left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
    box = (left, top, min(left + width, photo.width), min(top + height, photo.height))
    pixels = np.asarray(photo.resize(size, PIL.Image.Resampling.BILINEAR, box=box), dtype=np.float32)
    pixels = pixels[:: 1 - 2 * int(rng.integers(2)), :: 1 - 2 * int(rng.integers(2))]
    return np.ascontiguousarray(pixels[:, :, rng.permutation(3)] if rng.random() < 0.3 else pixels)


def surface(
    rng: np.random.Generator, size: tuple[int, int], base_C: np.ndarray, roughness: float, shading: float
) -> np.ndarray:
    """Return a surface (h, w, C) about `base_C`: texture of standard deviation `roughness`, a gradient of `shading`."""
    width, height = size
    across, down = rng.uniform(-shading, shading, 2)
    gradient_HW = (
        1
        + np.linspace(-across, across, width, dtype=np.float32)[None]
        + np.linspace(-down, down, height, dtype=np.float32)[:, None]
    )
    painted = gradient_HW[:, :, None] * base_C
    if roughness > 0:
        detail = texture(rng, size, (0.4, 1.6))
        detail -= np.einsum("hwc->c", detail) / (width * height)
        deviation = float(np.sqrt(np.einsum("hwc,hwc->", detail, detail) / detail.size))
        # a flat crop is mostly sensor noise and compression blocks, so it is amplified at most 1.5 times
        detail *= np.float32(min(roughness / (deviation + 1e-3), 1.5))
        painted += detail
    return painted


@functools.cache
def _image(name: str) -> PIL.Image.Image:
    return PIL.Image.fromarray(photograph(name))


def _polar(angle: np.ndarray, radius: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _area(curve: np.ndarray) -> float:
    x, y = curve.T
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))
