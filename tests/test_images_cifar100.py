"""Tests of CIFAR-100 with a tiny folder in torchvision's format, whose checksums torchvision is patched to expect."""

import hashlib
import io
import pickle
import tarfile
from urllib.error import URLError

import numpy as np
import PIL.Image
import pytest
from torchvision.datasets import CIFAR100

from fmdistill.images import build
from fmdistill.images.cifar100 import FILES, Cifar100
from fmdistill.registry import UserError

SIZES = {"train": 7, "test": 3}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with a cifar-100-python that torchvision accepts as complete."""
    rng = np.random.default_rng(0)
    (tmp_path / FILES).mkdir()
    md5 = {}
    for name in ("train", "test", "meta"):
        content = {"fine_label_names": [f"class {i}" for i in range(100)]}
        if name != "meta":
            count = SIZES[name]
            labels = rng.integers(0, 100, count).tolist()
            content = {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "fine_labels": labels}
        data = pickle.dumps(content)
        (tmp_path / FILES / name).write_bytes(data)
        md5[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5["meta"]})
    return tmp_path


def raw(root, name):
    return pickle.loads((root / FILES / name).read_bytes())


def test_images_and_labels_are_the_files_own(root):
    source = Cifar100(str(root), shard_size=4)
    assert source.shards() == {"train": ["train-000", "train-001"], "validation": ["validation-000"]}
    assert [source.count(name) for name in ("train-000", "train-001", "validation-000")] == [4, 3, 3]
    for split, name in (("train", "train"), ("validation", "test")):
        rows, images = raw(root, name), [e for shard in source.shards()[split] for e in source.read(shard)]
        assert [e.label for e in images] == rows["fine_labels"] and all(type(e.label) is int for e in images)
        assert [e.key for e in images] == [f"cifar100-{split}-{i:05d}" for i in range(SIZES[name])]
        for encoded, row in zip(images, rows["data"], strict=True):
            image = PIL.Image.open(io.BytesIO(encoded.data))
            assert (image.mode, image.format) == ("RGB", "PNG")
            assert np.array_equal(np.asarray(image).transpose(2, 0, 1).ravel(), row)


def test_fetch_equals_read_and_raises_for_other_keys(root):
    source = Cifar100(str(root), shard_size=4)
    read = list(source.read("train-001"))
    assert [e.key for e in read] == source.keys("train-001")
    assert [source.fetch("train-001", e.key) for e in read] == read
    for key in ("cifar100-train-00000", "cifar100-validation-00005", "cifar100-train-5", "photo"):
        with pytest.raises(KeyError):
            source.fetch("train-001", key)


def test_the_registry_and_the_identity(root):
    images = build({"name": "cifar100", "root": str(root), "limit": 2})
    assert [(shard.split, shard.take) for shard in images.shards()] == [("train", 2), ("validation", 2)]
    identity = Cifar100(str(root)).identity()
    assert str(root) not in str(identity) and identity == Cifar100("elsewhere", download=True).identity()
    assert identity != Cifar100(str(root), shard_size=2).identity()


def test_making_the_source_reads_nothing():
    Cifar100("nowhere", download=True)
    with pytest.raises(UserError, match="images.shard_size=0"):
        Cifar100("nowhere", shard_size=0)


def test_missing_and_damaged_files_name_the_option(root, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="images.root=.*empty: contains no complete.*images.download=true") as caught:
        Cifar100(str(tmp_path / "empty")).shards()
    assert "\n" not in str(caught.value)
    with (root / FILES / "train").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="contains no complete folder cifar-100-python"):
        Cifar100(str(root)).shards()


def test_a_failed_download_raises_with_the_reason_and_the_way_out(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(UserError, match="images.download=true: URLError.*Name or service.*put it into") as caught:
        Cifar100(str(tmp_path), download=True).shards()
    assert "cifar-100-python.tar.gz" in str(caught.value) and "\n" not in str(caught.value)


def test_download_unpacks_an_archive_that_exists_already(root, tmp_path, monkeypatch):
    place = tmp_path / "fresh"
    place.mkdir()
    with tarfile.open(place / "cifar-100-python.tar.gz", "w:gz") as tar:
        tar.add(root / FILES, FILES)
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5((place / "cifar-100-python.tar.gz").read_bytes()).hexdigest())
    source = Cifar100(str(place), download=True, shard_size=4)
    assert source.shards()["train"] == ["train-000", "train-001"]
    assert list(source.read("train-000")) == list(Cifar100(str(root), shard_size=4).read("train-000"))
