"""Generate the images of source `captioned`: one object each, a caption, and the class that the caption names."""

from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
import PIL.Image

from fmdistill.images.numbered import Numbered, check_counts, png
from fmdistill.images.source import SPLITS, Encoded
from fmdistill.mini.figures import COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Attributes, draw
from fmdistill.registry import UserError

# The first ones name the class alone, as zero-shot prompts do; {name} is texture, colour and shape.
CAPTIONS = (
    "a {name}",
    "a picture of a {name}",
    "a photo of a {name}",
    "a {size} {name} {place}",
    "a picture of a {size} {name} {place}",
    "{place} there is a {size} {name}",
    "a {size} {colour} {shape}, {texture}, {place}",
    "the {shape} {place} is {size}, {colour} and {texture}",
)
Combinations = Literal["seen", "unseen", "all"]


@dataclass(frozen=True)
class Captioned(Numbered):
    """A source of PNG images of one object on a photographic or plain background, with a caption in the column `txt`.

    The label is the class of shape, colour and texture: its index in `class_names()`. A fixed fifth of the classes
    never occurs in the train split, whose attributes are Zipf distributed; validation is uniform over its classes.
    """

    train: int = 4096
    validation: int = 512
    size: int = 64  # pixels, both sides
    seed: int = 0
    shard_size: int = 256
    validation_combinations: Combinations = "all"
    zipf: float = 1.0  # exponent: an attribute's value of rank r has a share of r^-zipf; 0 is uniform
    photo_background: float = 0.5  # share of backgrounds that are a photograph
    noise: float = 6.0  # largest standard deviation, levels

    def __post_init__(self) -> None:
        """Check the settings."""
        names = ("train", "validation", "size", "seed", "shard_size")
        check_counts("images", **{name: getattr(self, name) for name in names})
        if not 0 <= self.photo_background <= 1:
            raise UserError(f"images.photo_background={self.photo_background}: expected a share from 0 to 1")
        for name in ("zipf", "noise"):
            if getattr(self, name) < 0:
                raise UserError(f"images.{name}={getattr(self, name)}: expected 0 or more")

    def identity(self) -> dict:
        """Return all settings."""
        return {"name": "captioned", **asdict(self)}

    def attributes(self, split: str, index: int) -> Attributes:
        """Return what image `index` of a split shows."""
        return self._attributes(np.random.default_rng([self.seed, SPLITS.index(split), index]), split, index)

    def key(self, split: str, index: int) -> str:
        """Return the key of image `index` of a split."""
        return f"captioned-{split}-{index:06d}"

    def encode(self, split: str, index: int) -> Encoded:
        """Return image `index` of a split."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        attributes = self._attributes(rng, split, index)
        text = caption(rng, attributes)
        pixels = draw(rng, attributes, self.size, self.photo_background, self.noise)
        label = class_names().index(attributes.name)
        return Encoded(self.key(split, index), png(PIL.Image.fromarray(pixels)), label, {"txt": text.encode()})

    def labels(self, shard: str) -> list[int | None]:
        """Return the labels of the shard's images, in the order of the keys, without drawing them."""
        split, indices = self._indices(shard)
        return [class_names().index(self.attributes(split, index).name) for index in indices]

    def _attributes(self, rng: np.random.Generator, split: str, index: int) -> Attributes:
        if split == "train":
            names = self._tailed(rng)
            while names in unseen():
                names = self._tailed(rng)
            size, place = self._pick(rng, list(SIZES)), self._pick(rng, list(PLACES))
            return Attributes(*names, size, place)
        chosen = [c for c in combinations() if self.validation_combinations in ("all", _part(c))]
        cycle, number = divmod(index, len(chosen))  # every class once a cycle
        order = np.random.default_rng([self.seed, cycle]).permutation(len(chosen))
        size, place = (values[rng.integers(len(values))] for values in (list(SIZES), list(PLACES)))
        return Attributes(*chosen[int(order[number])], size, place)

    def _tailed(self, rng: np.random.Generator) -> tuple[str, str, str]:
        return self._pick(rng, SHAPES), self._pick(rng, list(COLOURS)), self._pick(rng, TEXTURES)

    def _pick(self, rng: np.random.Generator, values: tuple[str, ...] | list[str]) -> str:
        return values[int(np.searchsorted(self._shares[len(values)], rng.random(), side="right"))]

    @cached_property
    def _shares(self) -> dict[int, np.ndarray]:
        """The upper end of each value's share of [0, 1), by the number of values; the last value takes the rest."""
        counts = {len(SHAPES), len(COLOURS), len(TEXTURES), len(SIZES), len(PLACES)}
        weights = {n: np.arange(1, n + 1) ** -self.zipf for n in counts}
        return {n: np.cumsum(w / w.sum())[:-1] for n, w in weights.items()}


@cache
def combinations() -> list[tuple[str, str, str]]:
    """Return all (shape, colour, texture), in the order of the labels."""
    return [(shape, colour, texture) for shape in SHAPES for colour in COLOURS for texture in TEXTURES]


@cache
def unseen() -> frozenset[tuple[str, str, str]]:
    """Return the fifth of the combinations that training never shows: at most one texture of a shape and colour."""
    left_out = set()
    for s, shape in enumerate(SHAPES):
        for c, name in enumerate(COLOURS):
            left_out |= {(shape, name, pattern) for t, pattern in enumerate(TEXTURES) if (s + 2 * c + t) % 5 == 4}
    return frozenset(left_out)


@cache
def class_names() -> list[str]:
    """Return the name of each label, such as "striped red star"."""
    return [Attributes(*combination, "", "").name for combination in combinations()]


def words() -> list[str]:
    """Return every word of the captions, sorted."""
    texts = [template.replace("{", "").replace("}", "").replace(",", " ,") for template in CAPTIONS]
    named = {"name", "size", "place", "colour", "shape", "texture"}
    texts += [*SHAPES, *COLOURS, *TEXTURES, *SIZES, *PLACES]
    return sorted({word for text in texts for word in text.split()} - named)


def caption(rng: np.random.Generator, attributes: Attributes) -> str:
    """Return a caption of an image with these attributes, by a template drawn at random."""
    template = CAPTIONS[rng.integers(len(CAPTIONS))]
    return template.format(name=attributes.name, **attributes._asdict())


def _part(combination: tuple[str, str, str]) -> str:
    return "unseen" if combination in unseen() else "seen"
