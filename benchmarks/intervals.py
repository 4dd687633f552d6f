"""Count how often the bootstrap interval over images holds the true mean, and time it: see docs/report.md.

python benchmarks/intervals.py
"""

import time

import numpy as np

from fmdistill.evaluate.intervals import Means

SETS = 1000
TRUTH = 4 / 6


def simulate(images: int, sets: int, generator: np.random.Generator) -> Means:
    """Return the means of `sets` sets: each image has its own level, beta(4, 2), and 1 to 20 values around it."""
    means = Means()
    for number in range(sets):
        for image in range(images):
            level = generator.beta(4, 2)
            values = generator.beta(8 * level, 8 * (1 - level), size=generator.integers(1, 21))
            means.add(str(image), "student", f"iou {number}", values)
    return means


def main() -> None:
    """Print a line for each number of images."""
    generator = np.random.default_rng(0)
    for images in (3, 5, 10, 20, 60, 200):
        rows = simulate(images, SETS, generator).rows()
        held = sum(row["low"] <= TRUTH <= row["high"] for row in rows)
        width = np.mean([row["high"] - row["low"] for row in rows])
        print(f"{images:5} images: {100 * held / SETS:5.1f} % of {SETS} intervals hold the mean, width {width:.3f}")
    for images in (500, 5000, 50000):
        means = simulate(images, 1, generator)
        start = time.process_time()
        means.rows()
        print(f"{images:5} images: {time.process_time() - start:.2f} s of a core for the intervals of a result")


if __name__ == "__main__":
    main()
