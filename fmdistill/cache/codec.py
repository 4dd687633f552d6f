"""Codecs: how one teacher output becomes a member of a shard, or a row of one.

An output is a map (C, g, g) or a vector (D,), float32. A codec has a layout, which is the numpy dtype and shape of a
plain .npy, packs an output into it, and unpacks float32 tensors from it on any device. writer.py shows how to read a
member with numpy alone.
"""

import dataclasses
import io
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fmdistill.registry import UserError, suggest

if TYPE_CHECKING:  # loading torch takes seconds, and whether a cache is finished is known without it
    from torch import Tensor

Shape = tuple[int, ...]
TRIMMED = "-trimmed"  # ends the name of a codec that trims, in manifests and sidecars
CHUNK = 1 << 17  # values packed at once: with what is computed from them, they fit into a core's cache
NORMAL = 2.0**-14  # from here on float16 is off by 2^-11 of a value at most


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """One way to store outputs as .npy, within `step` of the output's largest value, and within `least` of zero.

    With `trim` the writer stores only the rectangle of a map's valid tokens, and a reader fills the rest with zeros.
    """

    name: str
    step: float
    least: float
    trim: bool = False

    @property
    def label(self) -> str:
        """The codec's name in a manifest or sidecar, such as "int8-trimmed"."""
        return self.name + TRIMMED * self.trim

    @abstractmethod
    def layout(self, shape: Shape) -> tuple[np.dtype, Shape]:
        """Return the dtype and shape that store float32 of `shape`, whose leading axes stay as they are."""

    @abstractmethod
    def pack(self, array: np.ndarray) -> np.ndarray:
        """Return float32 `array` in its layout. OverflowError where a value leaves the codec's range."""

    @abstractmethod
    def unpack(self, data: "Tensor", shape: Shape) -> "Tensor":
        """Return the float32 tensor of `shape`, on its device, from the bytes that `pack` gave, uint8 (nbytes,)."""

    def nbytes(self, shape: Shape) -> int:
        """Return the bytes of float32 of `shape` as `pack` gives them."""
        dtype, stored = self.layout(shape)
        return dtype.itemsize * math.prod(stored)

    def decode(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        """Return the float32 array of `shape` of what `pack` gave."""
        import torch

        return self.unpack(torch.from_numpy(stored.reshape(-1).view(np.uint8)), shape).numpy()

    def encode(self, array: np.ndarray) -> bytes:
        """Return the bytes of `array`'s member; OverflowError as for `pack`."""
        return b"".join((self.header(array.shape), self.pack(array).reshape(-1).view(np.uint8).data))

    def header(self, shape: Shape) -> bytes:
        """Return what comes before the data of a plain .npy of `shape`."""
        dtype, stored = self.layout(shape)
        return _header(dtype, stored)

    def size(self, shape: Shape) -> int:
        """Return the bytes that one array of `shape` takes in a shard: .npy header, data, tar header and padding."""
        data = len(self.header(shape)) + self.nbytes(shape)
        return 512 + -(-data // 512) * 512


@dataclass(frozen=True, kw_only=True)
class Floats(Codec):
    """Every value in `dtype`; bfloat16, which numpy lacks, as the bits of its upper half of a float32, unsigned."""

    dtype: str

    def layout(self, shape: Shape) -> tuple[np.dtype, Shape]:
        """Return the dtype and the very shape."""
        return np.dtype("<u2" if self.dtype == "bfloat16" else self.dtype), shape

    def pack(self, array: np.ndarray) -> np.ndarray:
        """Return `array` rounded to nearest; with float32, `array` itself if it is contiguous."""
        import torch

        dtype = getattr(torch, self.dtype)
        # rounding keeps the order, so only the largest magnitude need be looked at; a NaN is its own maximum
        if not torch.tensor(_largest(array)).to(dtype).isfinite():
            raise _overflow(array, self.name)
        rounded = torch.from_numpy(array).to(dtype).contiguous()
        return rounded.view(torch.uint8).numpy().view(self.layout(array.shape)[0])

    def unpack(self, data: "Tensor", shape: Shape) -> "Tensor":
        """Return the values in float32, each exactly."""
        import torch

        return data.view(getattr(torch, self.dtype)).view(shape).float()


@dataclass(frozen=True, kw_only=True)
class Integers(Codec):
    """Signed integers of 8 or 4 `bits` and one scale for each row of the last axis: of a map's tokens, or a vector.

    A row is a record of scale, float16, and value, int8 (w,); with 4 bits (w + 1) // 2, each byte one value in its low
    half and the next in its high half. Neighbouring tokens of a channel are alike, so one scale suits them better than
    it suits the channels of a token: half the error, for both widths, on sam_mini's embeddings.
    """

    bits: int

    @property
    def top(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1

    def layout(self, shape: Shape) -> tuple[np.dtype, Shape]:
        """Return the record of one row, and the shape without its last axis."""
        width = -(-shape[-1] * self.bits // 8)
        return np.dtype([("scale", "<f2"), ("value", "i1", (width,))]), shape[:-1]

    def pack(self, array: np.ndarray) -> np.ndarray:
        """Return records: the scale is the row's largest magnitude over the largest integer."""
        dtype, shape = self.layout(array.shape)
        stored = np.empty(shape, dtype)
        # a few leading rows at a time, so that what is computed on the way stays in the processor's cache
        whole = array if array.ndim > 1 else array[None]
        step = max(1, CHUNK // max(1, math.prod(whole.shape[1:])))
        rows = stored.reshape(*whole.shape[:-1])
        with np.errstate(over="ignore"):
            for start in range(0, len(whole), step):
                if not self._fill(rows[start : start + step], whole[start : start + step]):
                    raise _overflow(array, self.name)
        return stored

    def _fill(self, stored: np.ndarray, array: np.ndarray) -> bool:
        """Fill the records `stored` with `array`'s rows; return whether their scales are finite."""
        import torch

        rows = torch.from_numpy(array)
        values = rows.abs()
        scale = (values.amax(-1).numpy() / self.top).astype("<f2")
        unit = scale.astype(np.float32)  # numpy is slow in half precision
        if not np.isfinite(unit).all():
            return False
        unit = np.where(unit > 0, unit, np.float32(1))
        torch.div(rows, torch.from_numpy(unit).unsqueeze(-1), out=values).round_()
        if (unit < NORMAL).any():  # only a scale that float16 cannot hold to 2^-11 leads beyond the largest integer
            values.clamp_(-self.top, self.top)
        stored["scale"] = scale
        width = values.shape[-1]
        if self.bits == 8:
            torch.from_numpy(stored["value"]).copy_(values)
        else:  # two values at once, the first in the lower byte
            pairs = torch.zeros(*values.shape[:-1], width + width % 2, dtype=torch.int8)
            pairs[..., :width] = values
            both = pairs.numpy().view("<i2")
            stored["value"].view(np.uint8)[...] = (both & 0x0F) | ((both >> 4) & 0xF0)
        return True

    def unpack(self, data: "Tensor", shape: Shape) -> "Tensor":
        """Return scale times value in float32."""
        import torch

        dtype, rows = self.layout(shape)
        records = data.view(*rows, dtype.itemsize)
        # `contiguous` would leave the strides of a single row, which need not be even, as a view of two bytes must
        scale = records[..., :2].clone(memory_format=torch.contiguous_format).view(torch.float16)
        value = records[..., 2:].view(torch.int8)
        if self.bits == 4:  # shifts of signed integers keep the sign
            value = torch.stack([(value << 4) >> 4, value >> 4], -1).flatten(-2)[..., : shape[-1]]
        return value * scale.float()


CODECS: dict[str, Codec] = {
    "fp32": Floats(name="fp32", dtype="float32", step=0.0, least=0.0),
    "fp16": Floats(name="fp16", dtype="float16", step=2.0**-11, least=2.0**-25),
    "bf16": Floats(name="bf16", dtype="bfloat16", step=2.0**-8, least=2.0**-134),
    # half a scale, itself rounded; where float16 is coarse, a scale is off by up to 2^-25, so the row's largest by more
    "int8": Integers(name="int8", bits=8, step=(1 + 2.0**-11) / 254, least=128 * 2.0**-25),
    "int4": Integers(name="int4", bits=4, step=(1 + 2.0**-11) / 14, least=8 * 2.0**-25),
}
EXACT = "fp32"  # validation shards: teacher masks come from exact embeddings, never from a lossy or trimmed codec


def stacked(shape: Shape) -> bool:
    """Return whether outputs of this shape share one member a shard: a vector is small beside a member's header."""
    return len(shape) == 1


def padded(values: "Tensor", shape: Shape) -> "Tensor":
    """Return maps (..., C, h, w) with zeros below and to the right, of `shape` (C, g, g); others as they are."""
    if values.shape[-len(shape) :] == shape:
        return values
    import torch

    return torch.nn.functional.pad(values, (0, shape[-1] - values.shape[-1], 0, shape[-2] - values.shape[-2]))


def known(label: str) -> bool:
    """Return whether `label` is that of a codec."""
    return label.removesuffix(TRIMMED) in CODECS


def named(label: str) -> Codec:
    """Return the codec of a `label`, such as "int8-trimmed". UserError if there is none."""
    name = label.removesuffix(TRIMMED)
    if name not in CODECS:
        raise UserError(f"codec '{label}': unknown.{suggest(name, CODECS)}")
    return dataclasses.replace(CODECS[name], trim=label != name)


def _largest(array: np.ndarray) -> np.float32:
    return np.maximum(array.max(), -array.min())


def _overflow(array: np.ndarray, name: str) -> OverflowError:
    return OverflowError(f"a value of {_largest(array):.3g} does not fit {name}")


@lru_cache(maxsize=1024)
def _header(dtype: np.dtype, shape: Shape) -> bytes:
    buffer = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()
