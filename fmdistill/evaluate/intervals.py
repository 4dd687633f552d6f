"""Collect values of single images into means with bootstrap intervals over the images, paired between subjects.

Letters: N images, R resamples, K means.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fmdistill.evaluate import results
from fmdistill.evaluate.results import Key, Row

LEVEL = 0.95
RESAMPLES = 2000
CHUNK = 2**22  # image weights in memory at once
INTERVAL = "95 % bootstrap over images"
PER_IMAGE = "per_image"  # the name of the stored sums among a result's details


@dataclass
class Means:
    """Values by subject, metric, dimensions and image; a mean is over all values, an interval over the images.

    The values of one image, such as the IoU of its objects, are not independent: the images are resampled.
    """

    parts: dict[tuple[str, Key], dict[str, tuple[float, int]]] = field(default_factory=dict)  # image: (sum, count)

    def add(self, image: str, subject: str, metric: str, values: Iterable[float], **dimensions: Any) -> None:
        """Add values of one image; dimensions that are None are left out."""
        array = np.asarray(list(values), dtype=np.float64)
        if len(array):
            self.add_sum(image, subject, metric, float(array.sum()), len(array), **dimensions)

    def add_sum(self, image: str, subject: str, metric: str, total: float, count: int, **dimensions: Any) -> None:
        """Add a sum and what it is divided by; the sums of all images are divided by what all images have."""
        named = {name: entry for name, entry in dimensions.items() if entry is not None}
        images = self.parts.setdefault((subject, results.key({"metric": metric, **named})), {})
        known, counted = images.get(image, (0.0, 0))
        images[image] = (known + total, counted + count)

    def rows(self) -> list[Row]:
        """Return a row for each mean of any values, in the order of the first ones; of one image without an interval."""
        return [
            mean_row(subject, key, np.array([s for s, _ in images.values()]), np.array([n for _, n in images.values()]))
            for (subject, key), images in self.parts.items()
            if any(count for _, count in images.values())
        ]

    def details(self) -> dict[str, list[dict[str, Any]]]:
        """Return the sums and counts of every image as JSON, for `paired` comparisons of stored results."""
        return {
            PER_IMAGE: [
                {
                    **dict(key[1]),
                    "subject": subject,
                    "metric": key[0],
                    "images": list(images),
                    "sums": [total for total, _ in images.values()],
                    "counts": [count for _, count in images.values()],
                }
                for (subject, key), images in self.parts.items()
            ]
        }


def mean_row(subject: str, key: Key, sums_N: np.ndarray, counts_N: np.ndarray) -> Row:
    """Return the row of the mean of all values, with its interval if there is more than one image."""
    row = results.row(subject, key[0], sums_N.sum() / counts_N.sum(), int(counts_N.sum()), **dict(key[1]))
    if len(sums_N) < 2:
        return row
    (low,), (high,) = ends(resampled(sums_N[:, None], counts_N[:, None]))
    return {**row, "low": float(low), "high": float(high), "interval": INTERVAL}


def paired(of: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Return the difference of two means and its interval's ends; None unless they have two or more of the same images.

    Each is an entry of `Means.details`. Both means are resampled by the same images.
    """
    places = [{image: i for i, image in enumerate(entry["images"])} for entry in (of, base)]
    if places[0].keys() != places[1].keys() or len(places[0]) < 2:
        return None
    order = [[place[image] for image in of["images"]] for place in places]
    sums_N2, counts_N2 = (
        np.stack([np.asarray(entry[name], float)[o] for entry, o in zip((of, base), order, strict=True)], 1)
        for name in ("sums", "counts")
    )
    whole = sums_N2.sum(0) / counts_N2.sum(0)
    means_R2 = resampled(sums_N2, counts_N2)
    (low,), (high,) = ends(means_R2[:, :1] - means_R2[:, 1:])
    return float(whole[0] - whole[1]), float(low), float(high)


def resampled(sums_NK: np.ndarray, counts_NK: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the K means of R resamples of the images, float64 (R, K); NaN if a resample has no value of a mean."""
    parts = []
    for weights_rN in resamples(len(sums_NK), seed):
        with np.errstate(invalid="ignore"):
            parts.append((weights_rN @ sums_NK) / (weights_rN @ counts_NK))
    return np.concatenate(parts)


def resamples(images: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield how often each image occurs in each of R resamples with replacement, float64 (r, N), in several parts.

    They depend on the number of images and the seed alone.
    """
    generator, share = np.random.default_rng(seed), np.full(images, 1 / images)
    step = max(1, CHUNK // images)
    for start in range(0, RESAMPLES, step):
        yield generator.multinomial(images, share, size=min(step, RESAMPLES - start)).astype(np.float64)


def ends(values_RK: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile interval's two ends (K,) of R resampled values, without NaN."""
    outside = 100 * (1 - level) / 2
    low_K, high_K = np.nanpercentile(values_RK, [outside, 100 - outside], axis=0)
    return low_K, high_K
