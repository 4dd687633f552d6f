"""A batch of a cache: read as it is stored, straight into one tensor an output, and decoded on the training device.

Maps of a trimmed cache differ in shape. In their tensor of bytes those of one shape lie side by side, so that a device
decodes each shape at once, and nothing but what is stored travels to it.
"""

# Legend: B samples of a batch, C channels, g patches a side, D a vector's width.

import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmdistill.cache.codec import Codec, Shape, named, padded
from fmdistill.cache.reader import ShardReader


class BufferPool:
    """Memory of a process for batches, used again once a batch is gone: fresh memory takes longer than reading into it.

    It keeps, of each size, as many buffers as were ever lent at once.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def __reduce__(self) -> tuple[type["BufferPool"], tuple[()]]:
        return BufferPool, ()  # another process has its own memory

    def empty(self, size: int) -> np.ndarray:
        """Return `size` bytes, of any values; they are lent until every view of them, tensors too, is gone."""
        free = self._free[size]
        try:
            buffer = free.pop()
        except IndexError:
            buffer = np.empty(size, np.uint8)
        lent = np.frombuffer(buffer.data, np.uint8)  # what its views hold on to, where they would hold `buffer`
        weakref.finalize(lent, free.append, buffer).atexit = False
        return lent


def read(places: Sequence[tuple[ShardReader, int]], pool: BufferPool) -> dict[str, Any]:
    """Return the samples at (shard, index), all of one split, as they are stored; UserError where one is damaged.

    {"codecs": {output: its label}, "stored": {output: uint8 (bytes,)}, "shapes": {output: each sample's}}.
    """
    first = places[0][0]
    shapes = {name: [shard.shape(index, name) for shard, index in places] for name in first.shapes}
    rooms, slots = {}, [{} for _ in places]
    for name, whole in first.shapes.items():
        codec, start = first.codecs[name], 0
        room = pool.empty(len(places) * codec.nbytes(whole))
        for shape, rows in _alike(shapes[name]).items():
            for row in rows:
                slots[row][name] = room[start : start + codec.nbytes(shape)]
                start += codec.nbytes(shape)
        rooms[name] = torch.from_numpy(room[:start])
    for (shard, index), slot in zip(places, slots, strict=True):
        shard.read_into(index, slot)
    labels = {name: codec.label for name, codec in first.codecs.items()}
    return {"codecs": labels, "stored": rooms, "shapes": shapes}


def decoded(batch: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Return by output the float32 tensor (B, C, g, g) or (B, D) of what `read` gave, on the device that holds it.

    `shapes` are the cache's, of one image; a trimmed map is zero outside of what was kept.
    """
    return {
        name: _decoded(named(batch["codecs"][name]), stored, batch["shapes"][name], shapes[name])
        for name, stored in batch["stored"].items()
    }


def _decoded(codec: Codec, stored: Tensor, shapes: Sequence[Shape], whole: Shape) -> Tensor:
    groups, found, start = _alike(shapes), None, 0
    for shape, rows in groups.items():
        end = start + len(rows) * codec.nbytes(shape)
        values = padded(codec.unpack(stored[start:end], (len(rows), *shape)), whole)
        if len(groups) == 1:
            return values
        found = values.new_empty(len(shapes), *whole) if found is None else found
        found[torch.tensor(rows, device=found.device)] = values
        start = end
    assert found is not None, "a batch of no sample"
    return found


def _alike(shapes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """Return the rows of each shape, in the order in which they lie in the batch's bytes."""
    rows: dict[Shape, list[int]] = {}
    for row, shape in enumerate(shapes):
        rows.setdefault(tuple(shape), []).append(row)
    return rows
