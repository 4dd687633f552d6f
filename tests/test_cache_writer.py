"""What a shard's writer stores: the bytes of each codec, the statistics, and a tar of webdataset's own writer."""

import hashlib
import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

from fmdistill.cache import sidecar
from fmdistill.cache.codec import CODECS, named
from fmdistill.cache.outputs import StoredOutput
from fmdistill.cache.shard_tar import ShardTar
from fmdistill.cache.statistics import Statistics
from fmdistill.cache.store import Folder
from fmdistill.cache.writer import ShardWriter, TeacherInput
from fmdistill.images import Shard, escape, unescape

RNG = np.random.default_rng(0)
DRAWN = RNG.standard_normal((40, 16, 64), dtype=np.float32)
HALVES = (RNG.integers(-254, 255, (64, 8, 16)) / 2).astype(np.float32)  # quotients of which many are ties
ARRAYS = {
    "drawn": DRAWN,
    "more than is packed at once": RNG.standard_normal((33, 64, 64), dtype=np.float32),
    "rows of a map": DRAWN[:, :11],
    "columns of a map": DRAWN[:, :, :43],
    "odd width": np.ascontiguousarray(DRAWN[:3, :5, :7]),
    "one token": DRAWN[:, :1, :1],
    "vector": DRAWN[0, 0],
    "odd vector": DRAWN[0, 0, :5],
    "zeros": np.zeros((3, 4, 5), np.float32),
    "negative zeros": np.full((3, 4, 5), -0.0, np.float32),
    "denormals": DRAWN * np.float32(1e-39),
    "all magnitudes": DRAWN * np.exp(RNG.standard_normal((40, 16, 1)) * 2).astype(np.float32),
    **{f"ties of 2^-{e}": HALVES * np.float32(2.0**-e) for e in range(0, 36, 3)},  # down to scales that are denormal
}


def literal(name: str, array: np.ndarray) -> bytes:
    """The codecs as a formula says, value by value in numpy."""
    if name in ("fp32", "fp16"):
        return array.astype({"fp32": "<f4", "fp16": "<f2"}[name]).tobytes()
    if name == "bf16":  # to nearest, ties to even
        bits = array.astype("<f4").view("<u4").astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    top = {"int8": 127, "int4": 7}[name]
    rows = []
    for row in array.reshape(-1, array.shape[-1]):
        scale = np.float16(np.abs(row).max() / np.float32(top))
        unit = np.float32(scale if scale > 0 else 1)
        values = np.clip(np.rint(row / unit), -top, top).astype(int).tolist()
        if name == "int4":
            values = [*values, 0][: len(values) + len(values) % 2]
            values = [(a & 15) | (b & 15) << 4 for a, b in zip(values[::2], values[1::2], strict=True)]
        rows.append(scale.astype("<f2").tobytes() + bytes(value & 255 for value in values))
    return b"".join(rows)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("kind", ARRAYS)
def test_the_stored_bytes_are_those_of_the_formula(kind, name):
    array, codec = ARRAYS[kind], CODECS[name]
    expected = literal(name, array)
    assert codec.pack(array).tobytes() == expected
    data = codec.encode(array)
    assert data.endswith(expected) and np.load(io.BytesIO(data), allow_pickle=False).tobytes() == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65_520, -65_520, 3.39e38, 3.396e38, 3.4e38])
def test_a_value_is_refused_if_and_only_if_its_stored_form_is_not_finite(bad):
    array = np.array([[0.5, bad], [1, -2]], np.float32)
    with np.errstate(over="ignore"):
        finite = {
            "fp32": np.isfinite(array).all(),
            "fp16": np.isfinite(array.astype(np.float16)).all(),
            "bf16": (np.abs(array) < 255.5 * 2.0**120).all(),
            "int8": np.isfinite((np.abs(array) / 127).astype(np.float16)).all(),
            "int4": np.isfinite((np.abs(array) / 7).astype(np.float16)).all(),
        }
    for name, codec in CODECS.items():
        if finite[name]:
            assert codec.pack(array).tobytes() == literal(name, array)
        else:
            with pytest.raises(OverflowError, match=f"does not fit {name}"):
                codec.pack(array)


def corner(height: int, width: int, side: int = 16) -> np.ndarray:
    valid = np.zeros((side, side), bool)
    valid[:height, :width] = True
    return valid


MASKS = {
    "all": corner(16, 16),
    "landscape": corner(11, 16),
    "portrait": corner(16, 3),
    "corner": corner(5, 13),
    "none": corner(0, 0),
    "no rectangle": RNG.random((16, 16)) < 0.5,
}
FACTORS = (1.0, 1e-30, 1e30, 1e-12, 1e9)  # one a channel: whose squares leave single precision, and some within


@pytest.mark.parametrize("kind", MASKS)
def test_statistics_are_within_5e_7_of_double_precision(kind):
    valid, statistics = MASKS[kind], Statistics()
    maps = RNG.standard_normal((3, 15, 16, 16), dtype=np.float32)
    maps[:, :5] += 1000  # a mean far from zero
    maps[:, 5:10, ::2] = -maps[:, 5:10, 1::2]  # sums that cancel
    maps[:, 10] = 0.1  # roundings that all go one way
    maps[:, 11] = 0
    maps *= np.tile(FACTORS, 3).astype(np.float32)[:, None, None]
    for array in maps:
        statistics.add("map", array, valid)
    found = json.loads(json.dumps(statistics.to_json()))["map"]
    for name, mask in (("valid", valid), ("padded", ~valid)):
        tokens_CN = maps.transpose(1, 0, 2, 3)[..., mask].reshape(15, -1).astype(np.float64)
        stored = {key: np.array(value) for key, value in found[name].items()}
        assert stored["count"] == tokens_CN.shape[1] == 3 * mask.sum()
        assert (np.abs(stored["sum"] - tokens_CN.sum(1)) <= 5e-7 * np.abs(tokens_CN).sum(1)).all()
        square = (tokens_CN**2).sum(1)
        assert (np.abs(stored["square"] - square) <= 5e-7 * square).all()
        largest = np.abs(tokens_CN).max(1, initial=0)
        assert np.array_equal(stored["largest"].astype(np.float32), largest.astype(np.float32))


def test_roundings_that_all_go_one_way_do_not_add_up_over_a_large_map():
    values, statistics = np.linspace(0.1, 1, 64, dtype=np.float32), Statistics()
    statistics.add("map", np.broadcast_to(values[:, None, None], (64, 64, 64)).copy(), corner(64, 64, 64))
    found, exact = statistics.to_json()["map"]["valid"], values.astype(float)
    np.testing.assert_allclose(found["sum"], 4096 * exact, rtol=5e-7)
    np.testing.assert_allclose(found["square"], 4096 * exact**2, rtol=5e-7)


def test_statistics_of_a_vector_and_of_a_map_on_a_grid_of_its_own_count_every_value():
    statistics = Statistics()
    for row in DRAWN[0]:
        statistics.add("vector", row, None)
    statistics.add("small", DRAWN[:, :2, :2], None)
    found = statistics.to_json()
    assert found["vector"]["valid"]["count"] == 16 and found["small"]["valid"]["count"] == 4
    assert found["vector"]["padded"]["count"] == found["small"]["padded"]["count"] == 0
    np.testing.assert_allclose(found["vector"]["valid"]["sum"], DRAWN[0].astype(float).sum(0), rtol=1e-8)
    np.testing.assert_allclose(found["small"]["valid"]["square"], (DRAWN[:, :2, :2].astype(float) ** 2).sum((1, 2)))


KEYS = ["a", "folder/b.jpg", "\u00e9\u4e16/\udcff.png", "long" * 60, "_private"]


def written(root: Path) -> tuple[Path, dict]:
    """Return the tar and sidecar of a shard of maps and vectors with `KEYS`; one output's name begins with "_"."""
    root.mkdir()
    codecs = {"train": named("fp32")}
    stored = {"_map": StoredOutput((1, 2, 2), "image", codecs=codecs), "vector": StoredOutput((3,), codecs=codecs)}
    writer = ShardWriter(Folder(root), Shard("s", "train"), "identity", stored)
    for index, key in enumerate(KEYS):
        outputs = {"_map": DRAWN[index : index + 1, :2, :2], "vector": DRAWN[index, 0, :3]}
        item = TeacherInput(index, key, "hash", original=(2, 2), resized=(2, 2))
        writer.add(item, outputs, np.ones((2, 2), bool))
    writer.publish()
    fields = sidecar.read(root / "s.json")
    assert fields is not None
    return root / "s.tar", fields


def test_the_sidecar_s_offsets_sizes_and_hashes_are_the_tar_s_for_any_key(tmp_path):
    tar, fields = written(tmp_path / "a")
    data = tar.read_bytes()
    assert fields["sha256"] == hashlib.sha256(data).hexdigest() and fields["bytes"] == len(data)
    with tarfile.open(tar) as archive:
        members = {member.name: (member.offset_data, member.size) for member in archive}
    vectors = members["vector.npy"]
    for index, sample in enumerate(fields["samples"]):
        place = members[f"{escape(KEYS[index])}._map.npy"]
        record = sample["outputs"]["_map"]
        assert (record["offset"], record["size"]) == place
        stored = np.load(io.BytesIO(data[place[0] : place[0] + place[1]]), allow_pickle=False)
        assert np.array_equal(stored, DRAWN[index : index + 1, :2, :2])
        row = sample["outputs"]["vector"]
        assert vectors[0] < row["offset"] and row["offset"] + row["size"] <= vectors[0] + vectors[1]
        assert data[row["offset"] :][: row["size"]] == DRAWN[index, 0, :3].tobytes()
    assert len(members) == len(KEYS) + 2
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert [unescape(sample["__key__"]) for sample in samples] == [*KEYS, "vector"]


def test_neither_the_clock_nor_the_user_is_in_a_tar(tmp_path, monkeypatch):
    tar, fields = written(tmp_path / "a")
    monkeypatch.setattr(time, "time", lambda: 1.0)
    monkeypatch.setenv("USER", "somebody")
    again, same = written(tmp_path / "b")
    assert again.read_bytes() == tar.read_bytes() and same == fields
    with tarfile.open(tar) as archive:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in archive} == {(0, 0, 0, "", "", 0o644)}


def test_an_error_while_a_tar_is_written_names_it(tmp_path):
    class Full(io.RawIOBase):
        def write(self, data):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/s\.tar'"):
        ShardTar(tmp_path / "s.tar", Full()).add("a", "npy", b"data")  # type: ignore[arg-type]
