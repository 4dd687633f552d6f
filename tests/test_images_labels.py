"""Tests that `labels` of every source equals the labels of its images, without reading an image."""

import io
import tarfile
from pathlib import Path

import pytest

from fmdistill.images import build, cifar100, digits
from fmdistill.images.folder import ImageFolder
from fmdistill.images.tar import Place
from fmdistill.mini import captioned


def class_folders(root: Path) -> dict:
    for name in ("b", "a", "c"):
        (root / name).mkdir()
        for i in range(3):
            (root / name / f"{i}.png").write_bytes(b"not read")
    return {"name": "image_classes", "root": str(root), "validation_root": None, "shard_size": 4}


def packed(root: Path) -> dict:
    with tarfile.open(root / "a.tar", "w") as tar:
        for name, data in (
            ("2.png", b"x" * 9),
            ("2.cls", b"7\n"),
            ("1.png", b"y" * 9),
            ("0.cls", b"4"),
            ("0.png", b"z"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return {"name": "tar", "root": str(root), "train": ["a.tar"], "validation": []}


SOURCES = {
    "digits": lambda root: {"name": "digits", "train": 30, "validation": 20, "shard_size": 12, "seed": 3},
    "captioned": lambda root: {"name": "captioned", "train": 7, "validation": 4, "size": 32, "shard_size": 3},
    "image_classes": class_folders,
    "tar": packed,
    "photos": lambda root: {"name": "photos", "train": 3, "validation": 2, "size": 32, "shard_size": 2},
    "mix": lambda root: {"name": "mix", "sources": {"a": SOURCES["digits"](root), "b": SOURCES["tar"](root)}},
}


@pytest.mark.parametrize("name", SOURCES)
def test_labels_equal_those_of_the_images(tmp_path, name):
    images = build({**SOURCES[name](tmp_path), "limit": 5})
    shards = images.shards()
    expected = {shard.name: [image.label for image in images.read(shard)] for shard in shards}
    assert {shard.name: images.labels(shard) for shard in shards} == expected
    assert sum(map(len, expected.values())) >= 3
    if name == "tar":
        assert list(expected.values()) == [[7, None, 4]]


def test_no_image_is_read_drawn_or_encoded_for_its_label(tmp_path, monkeypatch):
    sources = {name: build(SOURCES[name](tmp_path)) for name in ("digits", "captioned", "image_classes", "tar")}
    read: list[int] = []
    for module in (digits, captioned, cifar100):
        monkeypatch.setattr(module, "png", lambda *a: pytest.fail("encoded an image"))
    monkeypatch.setattr(captioned, "draw", lambda *a: pytest.fail("drew an image"))
    monkeypatch.setattr(ImageFolder, "_read", lambda *a: pytest.fail("read an image"))
    for images in sources.values():
        for shard in images.shards():
            assert len(images.labels(shard)) == images.source.count(shard.name)
    opened = Place.open

    class Counted(io.BufferedReader):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(Place, "open", lambda self: Counted(io.FileIO(opened(self).name)))
    assert sources["tar"].labels(sources["tar"].shards()[0]) == [7, None, 4]
    assert read == [2, 1]  # the bytes of each "cls"


def test_cifar100_s_labels_are_its_list(monkeypatch):
    monkeypatch.setattr(cifar100, "_load", lambda root, train, download: ([None] * 5, [9, 8, 7, 6, 5]))
    monkeypatch.setattr(cifar100, "png", lambda *a: pytest.fail("encoded an image"))
    source = cifar100.Cifar100("nowhere", shard_size=2)
    names = source.shards()["train"]
    assert [source.labels(name) for name in names][:2] == [[9, 8], [7, 6]]
