"""Collect values of single images into means with bootstrap intervals over the images, paired between subjects.

Letters: N images, R resamples, K means.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from fmdistill.evaluate import results
from fmdistill.evaluate.results import PER_IMAGE, Key, Row

LEVEL = 0.95
RESAMPLES = 2000
CHUNK = 2**22  # image weights in memory at once
INTERVAL = "95 % bootstrap over images"

Entry = Mapping[str, Any]  # one of `Means.details`: the sums and counts of the images of one mean
Ends = tuple[float, float]  # of an interval
Difference = tuple[float, float, float]  # of two means, and the two ends of its interval


@dataclass
class Means:
    """Values by subject, metric, dimensions and image; a mean is over all values, an interval over the images.

    The values of one image, such as the IoU of its objects, are not independent: the images are resampled.
    """

    parts: dict[tuple[str, Key], dict[str, tuple[float, int]]] = field(default_factory=dict)  # image: (sum, count)

    def add(self, image: str, subject: str, metric: str, values: Iterable[float], **dimensions: Any) -> None:
        """Add values of one image, or none, which only sets the place of the row; dimensions of None are left out."""
        array = np.asarray(list(values), dtype=np.float64)
        self.add_sum(image, subject, metric, float(array.sum()), len(array), **dimensions)

    def add_sum(self, image: str, subject: str, metric: str, total: float, count: int, **dimensions: Any) -> None:
        """Add a sum and what it is divided by; the sums of all images are divided by what all images have."""
        named = {name: entry for name, entry in dimensions.items() if entry is not None}
        images = self.parts.setdefault((subject, results.key({"metric": metric, **named})), {})
        if count:
            known, counted = images.get(image, (0.0, 0))
            images[image] = (known + total, counted + count)

    def add_each(
        self, images: Sequence[str], subject: str, metric: str, values_N: Iterable[float], **dimensions: Any
    ) -> None:
        """Add one value of each of N images."""
        for image, value in zip(images, values_N, strict=True):
            self.add(image, subject, metric, [value], **dimensions)

    def rows(self) -> list[Row]:
        """Return a row for each mean that has values, in the order of the first `add`, with its interval."""
        rows = []
        for (subject, key), images in self.parts.items():
            if images:
                sums_N, counts_N = _arrays(images)
                count = int(counts_N.sum())
                rows.append(results.row(subject, key[0], sums_N.sum() / count, count, **dict(key[1])))
        return self.with_intervals(rows)

    def with_intervals(self, rows: Sequence[Row]) -> list[Row]:
        """Return rows with the intervals of the means of their subject, metric and dimensions.

        A mean of fewer than two images has none.
        """
        parts = [_arrays(self.parts.get((row["subject"], results.key(row)), {})) for row in rows]
        return [
            row if pair is None else {**row, "low": pair[0], "high": pair[1], "interval": INTERVAL}
            for row, pair in zip(rows, _intervals(parts), strict=True)
        ]

    def details(self, keys: bool = True) -> dict[str, list[dict[str, Any]]]:
        """Return the sums and counts of every image as JSON, for `differences` of stored results.

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
                if images
            ]
        }


def entry_key(entry: Entry) -> Key:
    """Return the metric and dimensions of one of `Means.details`."""
    return results.key({name: part for name, part in entry.items() if name not in ("images", "sums", "counts")})


def pooled(entries: Sequence[Entry]) -> Entry | None:
    """Return the entry of the mean of several runs' means, such as those of one method's seeds.

    Each is an entry of `Means.details`; None unless all have the same images with the same counts.
    """
    parts = [_aligned(entries[0], entry)[1] for entry in entries]
    if any(len(counts_N) != len(parts[0][1]) or (counts_N != parts[0][1]).any() for _, counts_N in parts):
        return None
    return {**entries[0], "sums": np.mean([sums_N for sums_N, _ in parts], axis=0).tolist()}


def of_entries(entries: Sequence[Entry]) -> list[Ends | None]:
    """Return the intervals of means, each one of `Means.details`; None for a mean of fewer than two images."""
    return _intervals([_sums_and_counts(entry) for entry in entries])


def paired(of: Entry, base: Entry, level: float = LEVEL) -> Difference | None:
    """Return the difference of two means and its interval's ends; None unless they have two or more of the same images.

    Each is an entry of `Means.details`. Both means are resampled by the same images.
    """
    return differences([(of, base)], level)[0]


def differences(pairs: Sequence[tuple[Entry, Entry]], level: float = LEVEL) -> list[Difference | None]:
    """Return `paired` of each pair; those of equally many images are resampled together, which saves time."""
    parts = [part for of, base in pairs for part in _aligned(of, base)]
    means = resampled_together(parts)
    compared: list[Difference | None] = []
    for number in range(0, len(parts), 2):
        of_R, base_R = means[number : number + 2]
        if of_R is None or base_R is None:
            compared.append(None)
            continue
        (of_sums, of_counts), (base_sums, base_counts) = parts[number : number + 2]
        whole = of_sums.sum() / of_counts.sum() - base_sums.sum() / base_counts.sum()
        compared.append((float(whole), *ends(of_R - base_R, len(of_sums), level)))
    return compared


def resampled_together(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray | None]:
    """Return the resampled means (R,) of each part, the sums (N,) and counts (N,) of its images; None for N below 2."""
    by_length: dict[int, list[int]] = {}
    for place, (sums_N, _) in enumerate(parts):
        if len(sums_N) > 1:
            by_length.setdefault(len(sums_N), []).append(place)
    means: list[np.ndarray | None] = [None] * len(parts)
    for places in by_length.values():
        sums_NK, counts_NK = (np.stack([parts[place][i] for place in places], axis=1) for i in (0, 1))
        for place, means_R in zip(places, resampled(sums_NK, counts_NK).T, strict=True):
            means[place] = means_R
    return means


def resampled(sums_NK: np.ndarray, counts_NK: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the K means of R resamples of the images, float64 (R, K)."""
    return np.concatenate([(w_rN @ sums_NK) / (w_rN @ counts_NK) for w_rN in resamples(len(sums_NK), seed)])


def resamples(images: int, seed: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
    """Yield how often each image occurs in each of R resamples with replacement, float64 (r, N), in several parts.

    They depend on the number of images and the seed alone; the first `count` are the same for any count.
    """
    generator = np.random.default_rng(seed)
    step, count = max(1, CHUNK // images), RESAMPLES if count is None else count
    for start in range(0, count, step):
        size = min(step, count - start)
        chosen_rN = generator.integers(images, size=(size, images)) + images * np.arange(size)[:, None]
        yield np.bincount(chosen_rN.ravel(), minlength=size * images).reshape(size, images).astype(np.float64)


def ends(values_R: np.ndarray, images: int, level: float = LEVEL) -> Ends:
    """Return the two ends of the interval of a mean over `images` images, given its R resampled values.

    They are percentiles, for few images further out, so that the interval of normal values is as wide as Student's
    (expanded percentiles: Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 2015).
    """
    tail = stats.norm.sf(math.sqrt(images / (images - 1)) * stats.t.ppf((1 + level) / 2, images - 1))
    low, high = np.quantile(values_R, [tail, 1 - tail])
    return float(low), float(high)


def with_interval(row: Row, values_R: np.ndarray, images: int) -> Row:
    """Return the row with the interval of a figure of `images` images, given its R resampled values."""
    low, high = ends(values_R, images)
    return {**row, "low": low, "high": high, "interval": INTERVAL}


def _intervals(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Ends | None]:
    """Return the intervals of the means of the parts, as for `resampled_together`."""
    means = zip(parts, resampled_together(parts), strict=True)
    return [None if means_R is None else ends(means_R, len(sums_N)) for (sums_N, _), means_R in means]


def _arrays(images: Mapping[str, tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the images' sums (N,) and counts (N,)."""
    array_N2 = np.array(list(images.values()), dtype=np.float64).reshape(-1, 2)
    return array_N2[:, 0], array_N2[:, 1]


def _aligned(of: Entry, base: Entry) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the sums and counts of both entries in the order of the first; empty ones if the images differ."""
    order = _order(of["images"], base["images"])
    if order is None:
        return [(np.empty(0), np.empty(0))] * 2
    sums_N, counts_N = _sums_and_counts(base)
    return [_sums_and_counts(of), (sums_N[order], counts_N[order])]


def _order(of: list[str] | str, base: list[str] | str) -> list[int] | slice | None:
    """Return the places of the images `of` in `base`; None if they are not the same images. A string is their hash."""
    if isinstance(of, str) or isinstance(base, str):
        hashes = {images if isinstance(images, str) else _digest(images) for images in (of, base)}
        return slice(None) if len(hashes) == 1 else None
    place = {image: i for i, image in enumerate(base)}
    return [place[image] for image in of] if place.keys() == set(of) else None


def _sums_and_counts(entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    """Return each image's sum (N,) and count (N,)."""
    sums_N = np.asarray(entry["sums"], dtype=np.float64)
    return sums_N, np.broadcast_to(np.asarray(entry["counts"], dtype=np.float64), sums_N.shape)


def _digest(images: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(images).encode(errors="surrogateescape")).hexdigest()[:16]


def _counts(images: Mapping[str, tuple[float, int]]) -> list[int] | int:
    """Return each image's count; a single number if all are equal."""
    counts = [count for _, count in images.values()]
    return counts[0] if len(set(counts)) == 1 else counts
