"""Codecs: how one teacher output becomes a member of a shard."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Codec:
    """A plain .npy member of the given dtype; `step` is its largest relative rounding error."""

    dtype: str
    step: float
    suffix: str = "npy"

    def encode(self, array: np.ndarray) -> bytes:
        """Return the member's bytes; `array` is float32. OverflowError where a value leaves the codec's range."""
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array.astype(self.dtype))
        if not np.isfinite(stored).all():
            raise OverflowError(f"a value of {np.abs(array).max():.3g} does not fit {self.dtype}")
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, stored, version=(1, 0), allow_pickle=False)
        return buffer.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        """Return the float32 array that `encode` was given, within `step`."""
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False).astype(np.float32)

    def size(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that one array of `shape` takes in a shard: .npy header, data, tar header and padding."""
        data = 128 + int(np.prod(shape)) * np.dtype(self.dtype).itemsize
        return 512 + -(-data // 512) * 512


CODECS: dict[str, Codec] = {"fp32": Codec("float32", 0.0), "fp16": Codec("float16", 2.0**-11)}
EXACT = "fp32"  # validation shards: teacher masks come from exact embeddings, never from a lossy codec


def by_split(names: Mapping[str, str]) -> dict[str, Codec]:
    """Return each split's codec, by its name in the manifest."""
    return {split: CODECS[name] for split, name in names.items()}
