"""Batches as they are stored: a buffer is lent until nothing sees it, maps of several shapes decode to their rows."""

import gc
import pickle

import numpy as np
import pytest
import torch

from fmdistill.cache import outputs, sidecar
from fmdistill.cache.batch import BufferPool, decode_outputs, read_outputs
from fmdistill.cache.codec import CODECS, named
from fmdistill.cache.reader import ShardReader
from fmdistill.cache.store import Folder
from fmdistill.cache.writer import ShardWriter, TeacherInput
from fmdistill.images import Shard
from fmdistill.recipe import CacheSettings
from fmdistill.teachers.output import Output

SHAPES = {"embedding": (6, 8, 8), "vector": (5,)}
SIZES = [(5, 8), (8, 3), (8, 8), (5, 8), (1, 8), (8, 3)]


def written(folder, label: str) -> tuple[ShardReader, dict[str, np.ndarray]]:
    """A shard of landscape, portrait and square maps with a vector each, and what was given to it."""
    rng, shard, codec = np.random.default_rng(0), Shard("train-000", "train"), named(label)
    arrays = {name: rng.normal(size=(len(SIZES), *shape)).astype(np.float32) for name, shape in SHAPES.items()}
    given = {name: Output(shape, "image" if len(shape) == 3 else None) for name, shape in SHAPES.items()}
    stored = outputs.stored(given, CacheSettings(root=str(folder), codec=codec.name, trim=codec.trim))
    writer = ShardWriter(Folder(folder), shard, "x", stored)
    for index, (height, width) in enumerate(SIZES):
        valid = np.zeros((8, 8), bool)
        valid[:height, :width] = True
        values = {name: array[index] for name, array in arrays.items()}
        writer.add(TeacherInput(index, f"image-{index}", "0", None, (8, 8), (height, width)), values, valid)
        if codec.trim:
            arrays["embedding"][index, :, ~valid] = 0
    writer.publish()
    finished = sidecar.finished(Folder(folder), shard, "x", stored)
    assert finished is not None
    return ShardReader(Folder(folder), shard, finished, "", stored), arrays


@pytest.mark.parametrize("trimmed", ["", "-trimmed"])
@pytest.mark.parametrize("name", CODECS)
def test_rows_of_any_shapes_decode_to_what_each_sample_reads(tmp_path, name, trimmed):
    reader, arrays = written(tmp_path, name + trimmed)
    pool = BufferPool()
    for rows in ([2, 0, 1, 3, 5, 4], [1, 5], [2]):
        stored = read_outputs([(reader, row) for row in rows], pool)
        read = sum(reader.codecs["embedding"].nbytes(reader.shape(row, "embedding")) for row in rows)
        assert stored["data"]["embedding"].shape == (read,) and stored["codecs"] == {
            "embedding": name + trimmed,
            "vector": name,
        }
        found = decode_outputs(stored, SHAPES)
        for output, array in arrays.items():
            assert found[output].dtype == torch.float32 and found[output].shape == (len(rows), *SHAPES[output])
            expected = np.stack([reader.read(row)[output] for row in rows])
            assert np.array_equal(found[output], expected)
            assert (
                np.abs(expected - array[rows]).max()
                <= np.abs(array).max() * reader.codecs["embedding"].step + reader.codecs["embedding"].least
            )


def test_a_buffer_is_lent_once_until_no_array_and_no_tensor_sees_it():
    pool = BufferPool()
    first = pool.empty(24)
    address, view = first.ctypes.data, torch.from_numpy(first[8:]).view(torch.float32)[1:]
    view.fill_(7)
    del first
    gc.collect()
    other = pool.empty(24)
    assert other.ctypes.data != address and pool.empty(16).ctypes.data not in (address, other.ctypes.data)
    other[:] = 0
    assert view.tolist() == [7, 7, 7]
    del view
    again = pool.empty(24)
    assert again.ctypes.data == address and len(again) == 24


def test_a_pool_goes_to_another_process_without_its_memory():
    pool = BufferPool()
    assert len(pool.empty(1 << 20)) == 1 << 20  # and is returned at once
    assert len(pickle.dumps(pool)) < 1000


def test_batches_that_are_kept_stay_what_they_are(tmp_path):
    reader, _ = written(tmp_path, "fp32")
    pool = BufferPool()
    kept = [read_outputs([(reader, row)], pool) for row in range(len(SIZES))]
    found = [decode_outputs(stored, SHAPES)["embedding"][0] for stored in kept]
    assert all(np.array_equal(one, reader.read(row)["embedding"]) for row, one in enumerate(found))
