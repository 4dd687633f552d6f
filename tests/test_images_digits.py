import dataclasses
import hashlib
import io
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_digits

from fmdistill.images import build
from fmdistill.images.digits import CLASSES, Digits, _allot
from fmdistill.registry import UserError


def every(source, split):
    return [encoded for shard in source.shards()[split] for encoded in source.read(shard)]


def counts(source, split="train"):
    by_digit = Counter(e.label for e in every(source, split))
    return [by_digit[digit] for digit in range(10)]


def keys(source, split="train"):
    return [e.key for e in every(source, split)]


def digest(source):
    rows = [(e.key, e.data, e.label) for split in ("train", "validation") for e in every(source, split)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def test_images_and_labels_are_scikit_learns_by_the_number_in_the_key():
    source, data = Digits(), load_digits()
    for split in ("train", "validation"):
        for encoded in every(source, split):
            index = int(encoded.key.removeprefix("digit-"))
            image = PIL.Image.open(io.BytesIO(encoded.data))
            assert (image.mode, image.format, image.size) == ("L", "PNG", (8, 8)) and encoded.label == data.target[
                index
            ]
            assert np.abs(np.asarray(image, float) - data.images[index] * 255 / 16).max() <= 0.5


def test_splits_are_disjoint_stratified_and_by_default_all():
    source = Digits()
    train, validation = keys(source), keys(source, "validation")
    assert len(validation) == 600 and len(train) == 1197 and len({*train, *validation}) == 1797
    for split, size in (("train", 1197), ("validation", 600)):
        for count, all_of_it in zip(counts(source, split), CLASSES, strict=True):
            assert abs(count - size * all_of_it / 1797) < 1
        start = [e.label for e in every(source, split)][:120]
        assert set(start) == set(range(10)), "the start of a split is mixed"


@pytest.mark.parametrize("imbalance", [2.0, 10.0, 100.0])
def test_the_tail_is_exponential_and_leaves_validation_alone(imbalance):
    source = Digits(imbalance=imbalance)
    tail = np.array(counts(source))
    rest = np.array(CLASSES) - counts(Digits(), "validation")
    assert np.abs(tail - rest * imbalance ** (-np.arange(10) / 9)).max() < 1
    assert keys(source, "validation") == keys(Digits(), "validation")
    few = counts(dataclasses.replace(source, train=250))
    assert sum(few) == 250 and np.abs(few - tail * (250 / tail.sum())).max() < 1.5


def test_a_digits_training_images_are_drawn_in_one_order():
    for settings in ({"train": 200}, {"imbalance": 10.0}):
        some, whole = every(Digits(**settings), "train"), every(Digits(), "train")
        chosen = {e.key for e in some}
        assert chosen < {e.key for e in whole} and [e.key for e in whole if e.key in chosen] == [e.key for e in some]


def test_shards_counts_and_fetch_agree():
    source = Digits(train=300, validation=130, shard_size=128)
    assert source.shards() == {
        "train": ["train-000", "train-001", "train-002"],
        "validation": ["validation-000", "validation-001"],
    }
    assert [source.count(name) for name in source.shards()["train"]] == [128, 128, 44]
    for name in ("train-002", "validation-001"):
        read = list(source.read(name))
        assert [e.key for e in read] == source.keys(name) and len(read) == source.count(name)
        assert [source.fetch(name, e.key) for e in read] == read
    for key in (source.keys("train-001")[0], "digit-1", "photo"):
        with pytest.raises(KeyError):
            source.fetch("train-000", key)
    with pytest.raises(KeyError):
        source.count("train-003")


def test_images_are_the_same_in_another_process_and_the_seed_decides_the_split():
    code = "from tests.test_images_digits import Digits, digest; print(digest(Digits()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == digest(Digits())
    assert set(keys(Digits(seed=1), "validation")) != set(keys(Digits(), "validation"))


def test_identity_is_json_and_holds_every_setting():
    identity = Digits().identity()
    assert json.loads(json.dumps(identity)) == identity
    assert {"name"} | {f.name for f in dataclasses.fields(Digits)} <= set(identity)


def test_the_registry_and_the_limit():
    images = build({"name": "digits", "train": "null", "imbalance": 10, "limit": 70})
    assert [shard.take for shard in images.shards()] == [70, 70]
    assert build({"name": "digits", "validation": 1797}).source.shards()["train"] == []


def test_largest_remainders():
    assert _allot(10, [1, 1, 1]).tolist() == [4, 3, 3]
    assert _allot(7, [0.5, 0.3, 0.2]).tolist() == [4, 2, 1]
    assert _allot(0, [0, 0]).tolist() == [0, 0]
    for total in range(0, 1798, 100):
        assert _allot(total, CLASSES).sum() == total


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train": 1198}, "images.train=1198: images.validation=600 and images.imbalance=1 leave 1197"),
        ({"train": 900, "imbalance": 10.0}, "images.train=900: .*images.imbalance=10 leave 4.."),
        ({"validation": 1798}, "images.validation=1798: only 1797"),
        ({"imbalance": 0.5}, "images.imbalance=0.5: expected 1"),
        ({"imbalance": float("nan")}, "images.imbalance=nan"),
        ({"imbalance": 1000.0}, "images.imbalance=1000: leaves digit 8 without a training image"),
        ({"train": -1}, "images.train=-1"),
        ({"seed": -1}, "images.seed=-1"),
        ({"shard_size": 0}, "images.shard_size=0"),
    ],
)
def test_a_wrong_setting_raises_before_data_is_touched(settings, says):
    with pytest.raises(UserError, match=says):
        Digits(**settings)
