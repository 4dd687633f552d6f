import hashlib
import io
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from fmdistill.mini.photos import PHOTOGRAPHS, Photos, photograph
from fmdistill.registry import UserError

SMALL = Photos(train=26, validation=9, size=48, shard_size=8)


def digest(source):
    names = sum(source.shards().values(), [])
    return hashlib.sha256(b"".join(e.data for name in names for e in source.read(name))).hexdigest()


def test_every_photograph_ships_and_none_is_in_both_splits():
    shapes = [photograph(name).shape for names in PHOTOGRAPHS.values() for name in names]
    assert all(channels == 3 and min(height, width) >= 300 for height, width, channels in shapes)
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["validation"])
    arrays = [photograph(name) for names in PHOTOGRAPHS.values() for name in names]
    assert len({a.tobytes() for a in arrays}) == len(arrays)


def test_a_missing_photograph_is_a_clear_error():
    with pytest.raises(UserError, match="photograph 'cat-picture'.*install scikit-image"):
        photograph("cat-picture")


def test_crops_come_from_the_photographs_of_their_split():
    for split, names in SMALL.shards().items():
        keys = [e.key for name in names for e in SMALL.read(name)]
        assert len(keys) == len(set(keys)) == getattr(SMALL, split)
        assert {key.rpartition("-")[0] for key in keys} == set(PHOTOGRAPHS[split])


def test_half_of_the_crops_are_not_square_in_every_shard():
    source = Photos(size=48)
    for name in sum(source.shards().values(), []):
        frames = [PIL.Image.open(io.BytesIO(e.data)).size for e in source.read(name)]
        assert set(frames) == {(48, 48), (48, 32), (32, 48)}
        assert 0.4 <= np.mean([width != height for width, height in frames]) <= 0.6


def test_counts_and_reads_agree_and_fetch_equals_read():
    assert SMALL.shards() == {
        "train": [f"train-00{i}" for i in range(4)],
        "validation": ["validation-000", "validation-001"],
    }
    assert [SMALL.count(name) for name in SMALL.shards()["train"]] == [8, 8, 8, 2]
    for name in ("train-003", "validation-001"):
        read = list(SMALL.read(name))
        assert len(read) == SMALL.count(name)
        assert [SMALL.fetch(name, e.key) for e in read] == read
    with pytest.raises(KeyError):
        SMALL.fetch("train-000", "chelsea-0000")
    with pytest.raises(KeyError):
        SMALL.count("train-009")


def test_crops_are_the_same_in_another_process_and_differ_by_seed():
    code = "from tests.test_mini_photos import SMALL, digest; print(digest(SMALL))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == digest(SMALL)
    assert digest(Photos(train=26, validation=9, size=48, shard_size=8, seed=1)) != digest(SMALL)


def test_a_crop_does_not_depend_on_how_many_there_are():
    more = Photos(train=100, validation=20, size=48, shard_size=8)
    assert list(more.read("train-001")) == list(SMALL.read("train-001"))


def test_wrong_settings_are_errors():
    with pytest.raises(UserError, match="images.shard_size=0"):
        Photos(shard_size=0)
