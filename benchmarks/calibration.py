"""Compare one-parameter corrections of predicted IoU on a demo's student and its teacher, cross-validated over images.

    fmdistill run recipes/demo/sam_mse.yaml
    python benchmarks/calibration.py runs/demo/sam_mse

Masks 1 to 3 of the run's student: against the teacher's masks at 6x6 points of the validation images, and, like the
teacher's own masks, against the objects of 24 generated scenes, one click each. Prints a markdown table.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import optimize, special

from fmdistill import recipe as recipes
from fmdistill.distill import load_student
from fmdistill.evaluate import truth
from fmdistill.evaluate.calibration import FOLDS, Calibration, expected_error, judge_image
from fmdistill.evaluate.segmenters import Segmenters

Form = Callable[[np.ndarray, float], np.ndarray]  # (predicted IoU, parameter) -> corrected IoU
Values = list[tuple[np.ndarray, np.ndarray]]  # predicted and real IoU of each image
SCENES = {"name": "scenes", "train": 1, "validation": 24, "seed": 3, "objects": [3, 7], "area": [0.01, 0.25]}


def odds(p: np.ndarray) -> np.ndarray:
    """Return log-odds of predicted IoU, which may lie outside 0 to 1."""
    return special.logit(np.clip(p, 1e-4, 1 - 1e-4))


FORMS: Mapping[str, Form] = {
    "none": lambda p, k: p,
    "power: p ** e^k": lambda p, k: np.sign(p) * np.abs(p) ** np.exp(k),
    "factor: p e^k": lambda p, k: p * np.exp(k),
    "shift: p + k": lambda p, k: p + k,
    "temperature: log-odds / e^k": lambda p, k: special.expit(odds(p) / np.exp(k)),
    "log-odds + k": lambda p, k: special.expit(odds(p) + k),
    "power of 1 - p": lambda p, k: 1 - np.sign(1 - p) * np.abs(1 - p) ** np.exp(k),
}


def fit(form: Form, predicted: np.ndarray, real: np.ndarray) -> float:
    """Return the parameter with the least mean squared difference."""
    return optimize.minimize_scalar(
        lambda k: np.square(form(predicted, k) - real).mean(), bounds=(-3, 3), method="bounded"
    ).x


def validated(form: Form, values: Values) -> tuple[float, float]:
    """Return root mean squared difference and calibration error with parameters fitted on the other folds of images."""
    corrected = []
    for number, (predicted, _) in enumerate(values):
        others = [pair for i, pair in enumerate(values) if i % FOLDS != number % FOLDS]
        k = fit(form, *(np.concatenate([pair[i] for pair in others]) for i in (0, 1)))
        corrected.append(form(predicted, k))
    x, y = np.concatenate(corrected), np.concatenate([real for _, real in values])
    return float(np.sqrt(np.square(x - y).mean())), expected_error(x, y)


def measure(protocol: Calibration, recipe: Any, run: str) -> dict[str, Values]:
    """Return the values of masks 1 to 3 by subject."""
    opened = Segmenters.open(recipe, {"student": load_student(run)}, protocol.images, protocol.teacher)
    joined = None if protocol.truth is None else truth.build(protocol.truth, protocol.annotations).join(opened.names)
    values: dict[str, Values] = {}
    for image in opened.images():
        for subject, pairs in judge_image(protocol, image, joined)["values"].items():
            arrays = (np.array(pairs[name])[:, 1:].ravel() for name in ("predicted", "real"))
            values.setdefault(subject, []).append(tuple(arrays))  # type: ignore[arg-type]
    return values


def main(run: str) -> None:
    """Print the table."""
    recipe = recipes.load_saved(run)
    columns = {"student, teacher's masks": measure(Calibration(grid=6), recipe, run)["student"]}
    exact = Calibration(truth={"name": "labels"}, images=SCENES, teacher=True)
    columns |= {f"{subject}, objects": values for subject, values in measure(exact, recipe, run).items()}
    print(f"| correction | {' | '.join(f'{name}: RMS, ECE' for name in columns)} |\n|---|{'---|' * len(columns)}")
    for name, form in FORMS.items():
        cells = ["{:.4f}, {:.4f}".format(*validated(form, values)) for values in columns.values()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1])
