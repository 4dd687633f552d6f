"""Define a batch: what it holds, how it is filled from places, and how cached outputs are read and decoded.

A cache's outputs are read as they are stored, into one tensor of bytes for each output, and decoded on the device that
the batch goes to. Maps of a trimmed cache differ in shape: those of one shape lie side by side in these bytes, so that
the device decodes them at once, and only what is stored travels to it.
"""

# Legend: B images of a batch, S a side of the network's input, C channels, g tokens a side, D a vector's width.

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fmdistill.cache.codec import Codec, Shape, named, padded
from fmdistill.cache.prepare import PreparedImage
from fmdistill.cache.reader import ShardReader

NO_LABEL = -1

Place = tuple[int, int, int]  # (epoch, shard, index)


class Annotation(TypedDict):
    """One image's key, shard and label: a sample without pixels."""

    keys: str
    shards: str
    labels: Tensor
    label_values: int
    outputs: dict[str, Tensor]


class Sample(Annotation):
    """One image of a batch, under the batch's names and without its first dimension."""

    pixels: Tensor
    sizes: Tensor
    originals: Tensor


class StoredOutputs(TypedDict):
    """A teacher's outputs as a cache stores them, each by its name."""

    codecs: dict[str, str]  # the codec's label
    data: dict[str, Tensor]  # uint8 (bytes,), the images of one shape side by side
    shapes: dict[str, list[Shape]]  # of each image
    epochs: list[int]  # of each image: those done before, from which its caption is drawn


class _Filled(TypedDict):
    pixels: Tensor
    sizes: Tensor
    originals: Tensor
    keys: list[str]
    shards: list[str]
    labels: Tensor
    label_values: list[int]
    outputs: dict[str, Tensor]


class Batch(_Filled, total=False):
    """B images for one forward pass, with what is known of each.

    `pixels` are uint8 (B, 3, S, S), `sizes` int64 (B, 2) their (h, w) without padding, `originals` int64 (B, 2) the
    (H, W) of the decoded images. `labels` are int64 (B,), -1 for an image without one; `label_values` are the same on
    the CPU, so that looking at them does not wait for a GPU. `outputs` are the teacher's by name, such as
    "sam.embedding", (B, C, g, g) or (B, D) float32; empty until a cache or a live teacher fills them. `stored` is what
    a cache has read for them. Training adds `whole`, the vectors of teacher and student for all images of the optimizer
    step; `parts`, the number of batches that the step is divided into, over processes and accumulation; `first`, the
    row of `whole` of this batch's first image; `epoch`, the number of epochs done, with its fraction; and `progress`,
    the share of the run's steps done before this one, in [0, 1). A batch for several teachers has `views`, the batch of
    each, and `stored_views` instead of pixels and outputs of its own.
    """

    stored: StoredOutputs
    stored_views: dict[str, StoredOutputs]
    views: dict[str, "Batch"]
    whole: dict[str, Tensor]
    parts: int
    first: int
    epoch: float
    progress: float


class Data(Protocol):
    """Images of one split, in shards of a fixed order."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the number of images of each shard."""
        ...

    def item(self, epoch: int, shard: int, index: int) -> Mapping[str, Any]:
        """Return one image as `sample` does; anything random is drawn from (seed, epoch, key)."""
        ...


@runtime_checkable
class BatchReader(Protocol):
    """Data of which a part is read for a whole batch at once, into the tensors that training gets.

    Threads of the training process read it: reading through a worker process would take several times as long.
    """

    def read_batch(self, places: Sequence[Place]) -> Mapping[str, Any]:
        """Return that part of the batch of `places`; `item` returns the rest. Must be safe to call from threads."""
        ...


def annotation(key: str, shard: str, label: int | None) -> Annotation:
    """Return the part of a sample that needs no pixels."""
    value = NO_LABEL if label is None else label
    return {"keys": key, "shards": shard, "labels": torch.tensor(value), "label_values": value, "outputs": {}}


def sample(image: PreparedImage) -> Sample:
    """Return one image of a batch."""
    return {
        **annotation(image.key, image.shard, image.label),
        "pixels": image.pixels,
        "sizes": torch.tensor(image.size),
        "originals": torch.tensor(image.original),
    }


def fill(data: Data, places: Sequence[Place]) -> Batch:
    """Return the batch of `places`, read in this process."""
    batch = collate([data.item(*place) for place in places])
    if isinstance(data, BatchReader):
        batch.update(data.read_batch(places))
    return batch


def collate(samples: Sequence[Mapping[str, Any]]) -> Any:
    """Return samples as one mapping: tensors stacked, anything else as a list."""
    return _stack(samples)


def _stack(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: _stack([value[key] for value in values]) for key in values[0]}
    return torch.stack(list(values)) if isinstance(values[0], Tensor) else list(values)


def with_outputs(batch: Batch, family: str, outputs: Mapping[str, Tensor]) -> Batch:
    """Return the batch with the outputs of a teacher of this family, and without what a cache stores of them."""
    filled = batch.copy()
    filled.pop("stored", None)
    filled["outputs"] = {f"{family}.{name}": value for name, value in outputs.items()}
    return filled


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on `device`."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return the batch with `function` applied to each of its tensors."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    return batch


class BufferPool:
    """Reuses a process's memory for batches that are gone: fresh memory takes longer than reading into it.

    For each size it keeps as many buffers as were ever lent at once.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def __reduce__(self) -> tuple[type["BufferPool"], tuple[()]]:
        return BufferPool, ()  # another process has its own memory

    def empty(self, size: int) -> np.ndarray:
        """Lend `size` bytes of arbitrary values until every view of them, tensors included, is gone."""
        free = self._free[size]
        try:
            buffer = free.pop()
        except IndexError:
            buffer = np.empty(size, np.uint8)
        lent = np.frombuffer(buffer.data, np.uint8)  # views hold on to this, not to `buffer`
        weakref.finalize(lent, free.append, buffer).atexit = False
        return lent


def read_outputs(places: Sequence[tuple[ShardReader, int]], pool: BufferPool) -> StoredOutputs:
    """Read the outputs of the images at (shard, index), all of one split; UserError if one is damaged."""
    first = places[0][0]
    shapes = {name: [shard.shape(index, name) for shard, index in places] for name in first.shapes}
    data, slots = {}, [{} for _ in places]
    for name, whole in first.shapes.items():
        codec, start = first.codecs[name], 0
        buffer = pool.empty(len(places) * codec.nbytes(whole))
        for shape, rows in _by_shape(shapes[name]).items():
            for row in rows:
                slots[row][name] = buffer[start : start + codec.nbytes(shape)]
                start += codec.nbytes(shape)
        data[name] = torch.from_numpy(buffer[:start])
    for (shard, index), slot in zip(places, slots, strict=True):
        shard.read_into(index, slot)
    codecs = {name: codec.label for name, codec in first.codecs.items()}
    return {"codecs": codecs, "data": data, "shapes": shapes, "epochs": [0] * len(places)}


def decode_outputs(stored: StoredOutputs, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Decode each output to float32 (B, C, g, g) or (B, D), on the device that holds its bytes.

    `shapes` are the cache's, of one image; a trimmed map is zero outside of what is stored.
    """
    return {
        name: _decode(named(stored["codecs"][name]), data, stored["shapes"][name], shapes[name])
        for name, data in stored["data"].items()
    }


def _decode(codec: Codec, data: Tensor, shapes: Sequence[Shape], whole: Shape) -> Tensor:
    groups, output_BX, start = _by_shape(shapes), None, 0
    for shape, rows in groups.items():
        end = start + len(rows) * codec.nbytes(shape)
        values = padded(codec.unpack(data[start:end], (len(rows), *shape)), whole)
        if len(groups) == 1:
            return values
        output_BX = values.new_empty(len(shapes), *whole) if output_BX is None else output_BX
        output_BX[torch.tensor(rows, device=output_BX.device)] = values
        start = end
    assert output_BX is not None, "a batch without images"
    return output_BX


def _by_shape(shapes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """Return the rows of each shape, in the order in which they lie in the batch's bytes."""
    rows: dict[Shape, list[int]] = {}
    for row, shape in enumerate(shapes):
        rows.setdefault(tuple(shape), []).append(row)
    return rows
