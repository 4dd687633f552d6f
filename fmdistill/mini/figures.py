"""Draw a small image of one figure: a shape of a colour, texture, size and place on a photographic or plain background.

Legend: H, W height and width; C = 3 colours in [0, 255]; V vertices; 2 = (x, y), right and down.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from fmdistill.mini.drawing import colour, rasterize, surface, texture

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent")
COLOURS = {
    "red": (205, 40, 40),
    "blue": (45, 80, 205),
    "green": (50, 160, 60),
    "yellow": (240, 220, 50),
    "white": (240, 240, 240),
    "orange": (240, 135, 30),
    "black": (25, 25, 25),
    "purple": (140, 55, 180),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"large": (0.30, 0.38), "medium": (0.23, 0.28), "small": (0.17, 0.21)}  # radius in widths of the image
PLACES = {  # direction from the middle
    "in the middle": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
CONTRAST = 90  # least distance in levels between the figure's colour and the background's mean


class Attributes(NamedTuple):
    """What an image shows and its caption says."""

    shape: str
    colour: str
    texture: str
    size: str
    place: str

    @property
    def name(self) -> str:
        """The class name, such as "striped red star"."""
        return f"{self.texture} {self.colour} {self.shape}"


def draw(rng: np.random.Generator, figure: Attributes, size: int, photo_background: float, noise: float) -> np.ndarray:
    """Return an image of the figure, uint8 (size, size, 3).

    `photo_background` is the share of backgrounds that are a photograph, `noise` the largest standard deviation.
    """
    base_C = np.clip(np.array(COLOURS[figure.colour]) + rng.uniform(-18, 18, 3), 0, 255)
    canvas = _background(rng, size, base_C, rng.random() < photo_background)
    radius = rng.uniform(*SIZES[figure.size]) * size
    # A large figure at an edge is cut a little, so that its place still shows.
    offset = min(0.31 * size, 0.5 * size - 0.85 * radius)
    centre = size / 2 + np.array(PLACES[figure.place]) * offset + rng.uniform(-0.05, 0.05, 2) * size
    turn = rng.uniform(-0.3, 0.3)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    stretch = np.array([rng.uniform(0.88, 1.12), 1.0])
    drawn = rasterize([curve * stretch @ rotation * radius + centre for curve in curves(figure.shape)], (size, size))
    assert drawn is not None, "a figure lies in its image"
    box, coverage = drawn
    painted = _paint(rng, base_C, figure.texture, coverage.shape, size)
    alpha = coverage[:, :, None] * np.float32(1 / 255)
    canvas[box] += alpha * (painted - canvas[box])
    canvas *= rng.uniform(0.82, 1.12)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(0, noise))
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


@cache
def curves(shape: str) -> list[np.ndarray]:
    """Return a shape's closed curves (V, 2) of about unit radius; the second is a hole."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if shape == "ring":
        return [circle, circle * 0.5]
    if shape == "square":
        return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.86]
    if shape == "triangle":
        return [np.array([[0, -1.1], [1.05, 0.8], [-1.05, 0.8]])]
    if shape == "star":
        spoke = np.arange(10) * np.pi / 5 - np.pi / 2
        return [np.stack([np.cos(spoke), np.sin(spoke)], axis=1) * np.where(np.arange(10) % 2, 0.48, 1.15)[:, None]]
    if shape == "cross":
        a, b = 0.34, 1.0
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a)]
        return [np.array([*corners, (-a, -a)])]
    if shape == "heart":
        down = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle) + 2.5
        return [np.stack([16 * np.sin(angle) ** 3, -down], axis=1) / 15]
    if shape == "crescent":
        outer, inner = circle[6:35], circle[34:5:-1] * 0.8 + [0.5, 0.0]
        return [np.concatenate([outer, inner])]
    return [circle]


def _background(rng: np.random.Generator, size: int, base_C: np.ndarray, photographic: bool) -> np.ndarray:
    clear_C = colour(rng, base_C, (CONTRAST, 255))
    if not photographic:
        return surface(rng, (size, size), clear_C, 0.0, shading=0.2)
    canvas = texture(rng, (size, size), (0.5, 4.0))
    mean_C = np.einsum("hwc->c", canvas) / (size * size)
    if np.linalg.norm(mean_C - base_C) < CONTRAST:
        canvas += (clear_C - mean_C).astype(np.float32)
    return np.clip(canvas, 0, 255, out=canvas)


def _paint(rng: np.random.Generator, base_C: np.ndarray, pattern: str, shape: tuple[int, ...], size: int) -> np.ndarray:
    """Return the figure's surface (h, w, C): its colour, and the pattern's marks darker (on black lighter)."""
    marks_C = base_C + 0.6 * (255 - base_C) if base_C.mean() < 60 else base_C * 0.4
    turn, phase = rng.uniform(0, np.pi) if pattern == "striped" else rng.uniform(-0.3, 0.3), rng.random(2)
    period = rng.uniform(0.09, 0.125) * size
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32) / np.float32(period)
    u = (x * np.cos(turn) + y * np.sin(turn) + phase[0]) % 1
    v = (y * np.cos(turn) - x * np.sin(turn) + phase[1]) % 1
    marked = {
        "plain": np.zeros_like(u, dtype=bool),
        "striped": u < 0.45,
        "dotted": (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.3**2,
        "checkered": (u < 0.5) != (v < 0.5),
    }[pattern]
    return np.where(marked[:, :, None], marks_C, base_C).astype(np.float32)
