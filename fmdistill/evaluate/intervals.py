"""Collect values of single images into means with bootstrap intervals over the images, paired between subjects.

Letters: N images, R resamples, K means.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        if not len(array):
            return
        named = {name: entry for name, entry in dimensions.items() if entry is not None}
        images = self.parts.setdefault((subject, results.key({"metric": metric, **named})), {})
        total, count = images.get(image, (0.0, 0))
        images[image] = (total + float(array.sum()), count + len(array))

    def add_each(
        self, images: Sequence[str], subject: str, metric: str, values_N: Iterable[float], **dimensions: Any
    ) -> None:
        """Add one value of each of N images."""
        for image, value in zip(images, values_N, strict=True):
            self.add(image, subject, metric, [value], **dimensions)

    def rows(self) -> list[Row]:
        """Return a row for each mean, in the order of the first values; without an interval if it has one image."""
        alike: dict[tuple[str, ...], list[tuple[str, Key]]] = {}  # means of the same images are resampled together
        for part, images in self.parts.items():
            alike.setdefault(tuple(images), []).append(part)
        rows: dict[tuple[str, Key], Row] = {}
        for parts in alike.values():
            values_KN2 = np.array([list(self.parts[part].values()) for part in parts], dtype=np.float64)
            rows |= zip(parts, mean_rows(parts, values_KN2[..., 0].T, values_KN2[..., 1].T), strict=True)
        return [rows[part] for part in self.parts]

    def details(self, keys: bool = True) -> dict[str, list[dict[str, Any]]]:
        """Return the sums and counts of every image as JSON, for `paired` comparisons of stored results.

        Without `keys`, "images" is a hash of the keys instead of their list, for results that store them elsewhere.
        """
        return {
            PER_IMAGE: [
                {
                    **dict(key[1]),
                    "subject": subject,
                    "metric": key[0],
                    "images": list(images) if keys else _digest(images),
                    "sums": [total for total, _ in images.values()],
                    "counts": [count for _, count in images.values()] if keys else _counts(images),
                }
                for (subject, key), images in self.parts.items()
            ]
        }


def mean_rows(parts: Sequence[tuple[str, Key]], sums_NK: np.ndarray, counts_NK: np.ndarray) -> list[Row]:
    """Return the row of each of K means of the same images, with its interval if there is more than one image.

    `parts` are each mean's subject, and its metric and dimensions.
    """
    totals = zip(sums_NK.sum(0).tolist(), counts_NK.sum(0).tolist(), strict=True)
    rows = [
        results.row(subject, key[0], total / count, int(count), **dict(key[1]))
        for (subject, key), (total, count) in zip(parts, totals, strict=True)
    ]
    if len(sums_NK) < 2:
        return rows
    pairs = zip(*ends(resampled(sums_NK, counts_NK)), strict=True)
    return [with_interval(row, *pair) for row, pair in zip(rows, pairs, strict=True)]


def with_interval(row: Row, low: float, high: float) -> Row:
    """Return the row with the ends of its bootstrap interval."""
    return {**row, "low": float(low), "high": float(high), "interval": INTERVAL}


def paired(of: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Return the difference of two means and its interval's ends; None unless they have two or more of the same images.

    Each is an entry of `Means.details`. Both means are resampled by the same images. Entries without their images' keys
    are compared if the images are the same in the same order.
    """
    order = _order(of["images"], base["images"])
    if order is None or len(of["sums"]) < 2:
        return None
    values_N22 = np.stack([_sums_and_counts(of), _sums_and_counts(base)[order]], axis=2)
    sums_N2, counts_N2 = values_N22[:, 0], values_N22[:, 1]
    whole = sums_N2.sum(0) / counts_N2.sum(0)
    means_R2 = resampled(sums_N2, counts_N2)
    (low,), (high,) = ends(means_R2[:, :1] - means_R2[:, 1:])
    return float(whole[0] - whole[1]), float(low), float(high)


def _order(of: list[str] | str, base: list[str] | str) -> list[int] | slice | None:
    """Return the places of the images `of` in `base`; None if they are not the same images. A string is their hash."""
    if isinstance(of, str) or isinstance(base, str):
        hashes = {images if isinstance(images, str) else _digest(images) for images in (of, base)}
        return slice(None) if len(hashes) == 1 else None
    place = {image: i for i, image in enumerate(base)}
    return [place[image] for image in of] if place.keys() == set(of) else None


def _sums_and_counts(entry: Mapping[str, Any]) -> np.ndarray:
    """Return each image's sum and count (N, 2)."""
    sums_N = np.asarray(entry["sums"], dtype=np.float64)
    return np.stack([sums_N, np.broadcast_to(entry["counts"], sums_N.shape)], axis=1)


def _digest(images: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(images).encode(errors="surrogateescape")).hexdigest()[:16]


def _counts(images: Mapping[str, tuple[float, int]]) -> list[int] | int:
    """Return each image's count; a single number if all are equal."""
    counts = [count for _, count in images.values()]
    return counts[0] if len(set(counts)) == 1 else counts


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
    generator, step = np.random.default_rng(seed), max(1, CHUNK // images)
    for start in range(0, RESAMPLES, step):
        chosen_rN = generator.integers(images, size=(min(step, RESAMPLES - start), images), dtype=np.int32)
        yield np.stack([np.bincount(chosen_N, minlength=images) for chosen_N in chosen_rN]).astype(np.float64)


def ends(values_RK: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile interval's two ends (K,) of R resampled values, without NaN."""
    outside = 100 * (1 - level) / 2
    low_K, high_K = np.nanpercentile(values_RK, [outside, 100 - outside], axis=0)
    return low_K, high_K
