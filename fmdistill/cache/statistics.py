"""Statistics of a shard's outputs, by which a teacher's targets can be standardised without reading the shard."""

# Legend: C channels, (h, w) tokens, k of them added in single precision, n such sums.

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fmdistill.cache.codec import stacked

ADDED = 8  # values added in single precision before double takes over
SAFE = 2.0**-40, 2.0**60  # largest magnitudes whose squares, and eight of them added, keep single precision


@dataclass
class Statistics:
    """Sums, sums of squares and largest magnitudes per channel, valid and padded tokens apart.

    Whatever the values, and in whatever order the hardware adds them: the largest magnitudes are exact, a sum is off by
    at most 5e-7 of the sum of magnitudes, and a sum of squares by 5e-7 of itself. This is the bound for `ADDED` values
    added in single precision; all else is added in double.
    """

    sums: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, output: str, array: np.ndarray, valid: np.ndarray | None) -> None:
        """Count one image's (C, g, g) map with its (g, g) validity, None if all of it is valid, or its vector (C,)."""
        if stacked(array.shape):
            array = array[:, None, None]
        valid = np.ones(array.shape[1:], bool) if valid is None else valid
        kinds = self.sums.setdefault(output, {kind: _Moments(len(array)) for kind in ("valid", "padded")})
        for kind, tokens in _parts(array, valid):
            if tokens.size:
                kinds[kind].add(tokens)

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, rounded to nine digits."""
        return {
            output: {kind: moments.to_json() for kind, moments in kinds.items()} for output, kinds in self.sums.items()
        }


class _Moments:
    """The statistics of one kind of tokens of one output, each (C,)."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sum, self.square, self.largest = (np.zeros(channels) for _ in range(3))

    def add(self, tokens: np.ndarray) -> None:
        """Count the tokens (C, h, w), of which there is at least one."""
        largest = np.maximum(tokens.max((1, 2)), -tokens.min((1, 2)))
        self.count += tokens[0].size
        self.largest = np.maximum(self.largest, largest)
        if ((largest != 0) & ((largest < SAFE[0]) | (largest > SAFE[1]))).any():
            tokens = tokens.astype(np.float64)
        for few in _few(tokens):  # (C, k, n)
            self.sum += few.sum(1).sum(1, dtype=np.float64)
            self.square += np.einsum("ckn,ckn->cn", few, few).sum(1, dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and lists."""
        lists = {"sum": self.sum, "square": self.square, "largest": self.largest}
        return {"count": self.count, **{k: [float(f"{x:.9g}") for x in v] for k, v in lists.items()}}


def _parts(array: np.ndarray, valid: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the map's valid and padded tokens as parts (C, h, w) of it: without a copy if they are rectangles."""
    size = rectangle(valid)
    if size is None:  # another package's padding
        yield "valid", array[:, None, valid]
        yield "padded", array[:, None, ~valid]
    else:
        height, width = size
        yield "valid", array[:, :height, :width]
        yield "padded", array[:, height:]
        yield "padded", array[:, :height, width:]


def _few(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the tokens (C, h, w) as arrays (C, k, n), k at most `ADDED`, without a copy."""
    channels, height, width = tokens.shape
    rows_touch = tokens.strides[1] == width * tokens.itemsize
    if rows_touch and height * width % ADDED == 0:
        yield tokens.reshape(channels, ADDED, -1)
    else:
        for row in range(0, height, ADDED):
            yield tokens[:, row : row + ADDED]


def rectangle(valid: np.ndarray) -> tuple[int, int] | None:
    """Return height and width of the upper left rectangle that is valid; None if what is valid is none."""
    height, width = int(valid.any(1).sum()), int(valid.any(0).sum())
    return (height, width) if valid[:height, :width].all() and valid.sum() == height * width else None
