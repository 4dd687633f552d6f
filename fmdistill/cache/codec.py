"""Codecs: how one teacher output becomes a member of a shard, or a row of one."""

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
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, self._stored(array), version=(1, 0), allow_pickle=False)
        return buffer.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        """Return the float32 array that `encode` was given, within `step`."""
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False).astype(np.float32)

    def encode_row(self, array: np.ndarray) -> bytes:
        """Return a vector's bytes in a stacked member, after `header`; otherwise as `encode`."""
        return self._stored(array).tobytes()

    def decode_row(self, data: bytes) -> np.ndarray:
        """Return the float32 vector that `encode_row` was given, within `step`."""
        return np.frombuffer(data, self.dtype).astype(np.float32)

    def header(self, shape: tuple[int, ...]) -> bytes:
        """Return what comes before the rows of a stacked member, so that it is a plain .npy of `shape`."""
        buffer = io.BytesIO()
        described = {"descr": np.lib.format.dtype_to_descr(np.dtype(self.dtype)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(buffer, {**described, "shape": shape})
        return buffer.getvalue()

    def size(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that one array of `shape` takes in a shard: .npy header, data, tar header and padding."""
        data = 128 + int(np.prod(shape)) * np.dtype(self.dtype).itemsize
        return 512 + -(-data // 512) * 512

    def _stored(self, array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array.astype(self.dtype))
        if not np.isfinite(stored).all():
            raise OverflowError(f"a value of {np.abs(array).max():.3g} does not fit {self.dtype}")
        return stored


CODECS: dict[str, Codec] = {"fp32": Codec("float32", 0.0), "fp16": Codec("float16", 2.0**-11)}
EXACT = "fp32"  # validation shards: teacher masks come from exact embeddings, never from a lossy codec


def stacked(shape: tuple[int, ...]) -> bool:
    """Return whether outputs of this shape share one member a shard: a vector is small beside a member's header."""
    return len(shape) == 1


def by_split(names: Mapping[str, str]) -> dict[str, Codec]:
    """Return each split's codec, by its name in the manifest."""
    return {split: CODECS[name] for split, name in names.items()}
