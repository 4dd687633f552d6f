"""Compare zero-shot accuracy on generated captioned images with chance and with what a figure's colour alone gives."""

# Legend: h, w pixels of the centre, C = 3 colours in [0, 255].

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from torch import nn

from fmdistill.distill.data import every
from fmdistill.evaluate import results, text_side
from fmdistill.evaluate.accuracy import TOP
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.results import Judged, Metric
from fmdistill.evaluate.text_classifier import class_names
from fmdistill.evaluate.zeroshot import Zeroshot
from fmdistill.mini.figures import COLOURS
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

CENTRE = 0.5  # of the image's side


@dataclass(frozen=True)
class CaptionedZeroshot:
    """Judge the student as the protocol `zeroshot` does, and beside it two subjects that learned nothing.

    "chance" guesses among all classes; "nearest colour" compares the mean colour of the image's centre with the
    colours' reference values and guesses among the classes that name the nearest one.
    """

    zeroshot: Zeroshot = field(default_factory=Zeroshot)

    metrics: ClassVar[Mapping[str, Metric]] = Zeroshot.metrics
    dimensions: ClassVar[Mapping[str, str]] = Zeroshot.dimensions

    def __post_init__(self) -> None:
        """Raise a UserError for class names without colours."""
        names = class_names(self.zeroshot.classnames)
        if not any(_named(names, colour) for colour in COLOURS):
            raise UserError(
                f"zeroshot.classnames={self.zeroshot.classnames}: no name holds a colour ({', '.join(COLOURS)}); "
                f"use the protocol zeroshot for other classes"
            )

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a recipe whose run will have no text tower."""
        text_side.check("captioned_zeroshot", recipe)

    def check_images(self, recipe: Recipe) -> None:
        """Raise a UserError for class folders that do not match the names, or a first image without a label."""
        self.zeroshot.check_images(recipe)

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module]) -> Judged:
        """Score students as `zeroshot` does, and add the top-1 and top-5 of "chance" and "nearest colour".

        The guesses are counted by their expectation, so nothing is drawn.
        """
        rows, details = self.zeroshot.judge(recipe, students)
        names = class_names(self.zeroshot.classnames)
        data = text_side.of_run(recipe, students, self.zeroshot.images, "captioned_zeroshot").data
        places = [place for (place,) in every(data, 1)][: self.zeroshot.limit]
        items = [data.item(*place) for place in places]
        chances = [guess(item["pixels"].permute(1, 2, 0).numpy(), int(item["labels"]), names) for item in items]
        means = Means()
        for k in TOP:
            if k <= len(names):
                rows.append(results.row("chance", f"top{k}", k / len(names), len(chances)))
                guesses = [min(1.0, k * chance) for chance in chances]
                means.add_each([item["keys"] for item in items], "nearest colour", f"top{k}", guesses)
        return [*rows, *means.rows()], details


def guess(pixels_hwC: np.ndarray, label: int, names: Sequence[str]) -> float:
    """Return the chance of guessing `label` from the colour of the image's centre alone."""
    named = _named(names, nearest_colour(pixels_hwC))
    return 1 / len(named) if label in named else 0.0


def nearest_colour(pixels_hwC: np.ndarray) -> str:
    """Return the name whose reference colour is nearest to the mean of the image's centre."""
    margin = [round(side * (1 - CENTRE) / 2) for side in pixels_hwC.shape[:2]]
    centre = pixels_hwC[margin[0] : -margin[0] or None, margin[1] : -margin[1] or None]
    mean_C = centre.reshape(-1, 3).mean(axis=0)
    distance = {name: np.linalg.norm(mean_C - reference) for name, reference in COLOURS.items()}
    return min(distance, key=lambda name: distance[name])


def _named(names: Sequence[str], colour: str) -> list[int]:
    return [label for label, name in enumerate(names) if colour in name.split()]
