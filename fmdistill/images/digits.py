"""Source `digits`: the 1,797 handwritten digits of 8x8 grey pixels that scikit-learn's wheel contains."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import PIL.Image

from fmdistill.images.numbered import check_counts, png, shard_names, shard_range
from fmdistill.images.source import Encoded
from fmdistill.registry import UserError

CLASSES = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)  # images of each digit from 0 to 9


@dataclass(frozen=True)
class Digits:
    """The digits as 8x8 grey PNG, labelled 0 to 9; `seed` draws disjoint splits, stratified by digit.

    First `validation` images are drawn, then `train` of the remaining ones, null for all. With `imbalance` r, only a
    fraction r^(-c / 9) of the remaining images of digit c are training images, so that digit 0 has r times as many as
    digit 9, as in the long-tailed CIFAR of Cui et al. 2019 (arXiv:1901.05555). Neither `train` nor `imbalance` changes
    the validation images.
    """

    train: int | None = None
    validation: int = 600
    imbalance: float = 1.0  # most to least frequent digit in training
    seed: int = 0
    shard_size: int = 256

    def __post_init__(self) -> None:
        """Check the settings, and that the digits are enough for them."""
        counts = {name: getattr(self, name) for name in ("train", "validation", "seed", "shard_size")}
        check_counts("images", **{name: value for name, value in counts.items() if value is not None})
        if not 1 <= self.imbalance < float("inf"):
            raise UserError(f"images.imbalance={self.imbalance}: expected 1 (balanced) or more")
        if self.validation > sum(CLASSES):
            raise UserError(f"images.validation={self.validation}: only {sum(CLASSES)} images exist; ask for fewer")
        _ = self._counts

    def shards(self) -> dict[str, list[str]]:
        """Return the shard names by split."""
        return shard_names(*self._totals, self.shard_size)

    def count(self, shard: str) -> int:
        """Return the number of images in the shard."""
        return len(shard_range(shard, *self._totals, self.shard_size)[1])

    def keys(self, shard: str) -> list[str]:
        """Return the shard's keys in order, such as "digit-0123" for scikit-learn's image 123."""
        split, indices = shard_range(shard, *self._totals, self.shard_size)
        return [f"digit-{self._split[split][i]:04d}" for i in indices]

    def read(self, shard: str) -> Iterator[Encoded]:
        """Yield the shard's images in order."""
        for key in self.keys(shard):
            yield _encode(key)

    def fetch(self, shard: str, key: str) -> Encoded:
        """Return one image. Raises KeyError if the shard has no such key."""
        if key not in self.keys(shard):
            raise KeyError(key)
        return _encode(key)

    def labels(self, shard: str) -> list[int | None]:
        """Return the labels of the shard's images, in the order of the keys."""
        split, indices = shard_range(shard, *self._totals, self.shard_size)
        return [int(_load()[1][self._split[split][i]]) for i in indices]

    def identity(self) -> dict:
        """Return all settings, and the rule for grey levels."""
        return {"name": "digits", **asdict(self), "levels": "0 to 16 as 0 to 255, rounded"}

    @cached_property
    def _counts(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of training and of validation images of each digit, two arrays (10,)."""
        validation = _allot(self.validation, CLASSES)
        available = (np.array(CLASSES) - validation) * self.imbalance ** (-np.arange(len(CLASSES)) / (len(CLASSES) - 1))
        most = int(available.sum() + 1e-6)
        total = most if self.train is None else self.train
        if total > most:
            raise UserError(
                f"images.train={total}: images.validation={self.validation} and images.imbalance={self.imbalance:g} "
                f"leave {most}; ask for at most {most}, or null for all"
            )
        train = _allot(total, available)
        if self.imbalance > 1 and total and not train.all():
            raise UserError(
                f"images.imbalance={self.imbalance:g}: leaves digit {int(train.argmin())} without a training image; "
                f"lower it, or images.validation, or raise images.train"
            )
        return train, validation

    @property
    def _totals(self) -> tuple[int, int]:
        train, validation = self._counts
        return int(train.sum()), int(validation.sum())

    @cached_property
    def _split(self) -> dict[str, np.ndarray]:
        """The indices in scikit-learn's data of each split's images, in random order."""
        train, validation = self._counts
        rng = np.random.default_rng(self.seed)
        draws, order = rng.permutation(sum(CLASSES)), rng.permutation(sum(CLASSES))
        rank = np.zeros(sum(CLASSES), int)  # the position of an image among the draws of its digit
        digits = _load()[1]
        for digit, count in enumerate(CLASSES):
            rank[draws[digits[draws] == digit]] = np.arange(count)
        held_out, used = rank < validation[digits], rank < (validation + train)[digits]
        return {"validation": order[held_out[order]], "train": order[(used & ~held_out)[order]]}


def _allot(total: int, shares: Sequence[float] | np.ndarray) -> np.ndarray:
    """Divide `total` into whole numbers in proportion to `shares`, by the largest remainders."""
    quota = total * np.asarray(shares, float) / max(np.sum(shares), 1e-9)
    counts = np.floor(quota + 1e-9).astype(int)
    counts[np.argsort(counts - quota, kind="stable")[: total - counts.sum()]] += 1
    return counts


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """Return all images, uint8 (1797, 8, 8) in [0, 255], and their digits (1797,)."""
    from sklearn.datasets import load_digits  # takes a second, which other sources should not wait for

    levels, digits = load_digits(return_X_y=True)
    assert tuple(np.bincount(digits)) == CLASSES
    return np.round(levels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), digits


def _encode(key: str) -> Encoded:
    images, digits = _load()
    index = int(key.rpartition("-")[2])
    return Encoded(key, png(PIL.Image.fromarray(images[index])), int(digits[index]))
