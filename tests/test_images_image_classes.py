"""Tests of class folders: labels are indices in sorted order, each root is a split, and no label changes unnoticed."""

from pathlib import Path

import pytest

from fmdistill.images import build
from fmdistill.images.image_classes import ImageClasses
from fmdistill.registry import UserError


def fill(root: Path, **counts: int) -> None:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.v1.JPEG").write_bytes(f"{name}{i}".encode())


def labels(source: ImageClasses, split: str) -> dict[str, int | None]:
    return {e.key: e.label for name in source.shards()[split] for e in source.read(name)}


def test_labels_are_the_sorted_folders_and_all_of_one_root_validates(tmp_path):
    fill(tmp_path, n02=3, n10=2, Zebra=1, n01=4, empty=0, **{".hidden": 1})
    source = ImageClasses(str(tmp_path), shard_size=3)
    assert source.classes == ["Zebra", "empty", "n01", "n02", "n10"]
    label_of = labels(source, "validation")
    assert source.shards()["train"] == [] and len(label_of) == 10 and len(source.shards()["validation"]) > 1
    assert all(label == source.classes.index(key.partition("/")[0]) for key, label in label_of.items())
    for name in source.shards()["validation"]:
        assert name.startswith("validation-") and source.count(name) == len(source.keys(name))
        for key in source.keys(name):
            assert source.fetch(name, key).label == label_of[key]
        with pytest.raises(KeyError):
            source.fetch(name, "n01/none.jpg")


def test_two_roots_are_two_splits_with_one_list_of_classes(tmp_path):
    fill(tmp_path / "train", a=3, b=2)
    fill(tmp_path / "val", a=0, b=1)
    source = ImageClasses(str(tmp_path / "train"), str(tmp_path / "val"))
    assert labels(source, "validation") == {"b/0.v1.JPEG": 1}
    assert sorted(labels(source, "train").values()) == [0, 0, 0, 1, 1]
    alone = ImageClasses(str(tmp_path / "train"))
    assert alone.identity() != source.identity()
    fill(tmp_path / "train", aa=1)  # after which the label of b is 2
    assert ImageClasses(str(tmp_path / "train")).identity() != alone.identity()


def test_folders_that_are_numbers_mean_their_numbers(tmp_path):
    for number in range(12):
        for root, name in (("numbered", str(number)), ("padded", f"{number:02d}"), ("gaps", str(7 * number))):
            fill(tmp_path / root, **{name: 2})
    numbered, padded, gaps = (ImageClasses(str(tmp_path / root)) for root in ("numbered", "padded", "gaps"))
    assert numbered.numbered and numbered.classes == [str(number) for number in range(12)]
    for source, step in ((numbered, 1), (padded, 1), (gaps, 7)):
        label_of = labels(source, "validation")
        assert len(label_of) == 24 and all(label == int(key.partition("/")[0]) for key, label in label_of.items())
        assert max(filter(None, label_of.values())) == 11 * step
    assert numbered.identity() == padded.identity()
    fill(tmp_path / "numbered", **{"12": 1})  # moves no other label
    assert ImageClasses(str(tmp_path / "numbered")).identity() == numbered.identity()


def test_of_two_roots_with_numbers_the_second_may_lack_some(tmp_path):
    fill(tmp_path / "train", **{str(number): 1 for number in range(11)})
    fill(tmp_path / "val", **{"02": 1, "10": 1})
    source = ImageClasses(str(tmp_path / "train"), str(tmp_path / "val"))
    assert labels(source, "validation") == {"02/0.v1.JPEG": 2, "10/0.v1.JPEG": 10}
    assert sorted(filter(None, labels(source, "train").values())) == list(range(1, 11))
    fill(tmp_path / "val", **{"11": 1})
    with pytest.raises(UserError, match="validation_root=.*class folder '11' is a label that no folder of images.root"):
        ImageClasses(str(tmp_path / "train"), str(tmp_path / "val")).shards()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["0", "1", "01"], "class folders '01' and '1' are the same label"),
        (["0", "-1", "2"], "class folder '-1' is a number, hence a label"),
        (["20190101", "3"], "class folder '20190101' is a number, hence a label, and labels are 0 to 999999"),
        (["0", "1", "2", "10", "thumbnails"], "4 class folders are numbers but 'thumbnails' is not"),
    ],
)
def test_numbers_that_cannot_be_labels_raise_with_the_first(tmp_path, names, says):
    fill(tmp_path, **dict.fromkeys(names, 1))
    with pytest.raises(UserError, match=f"images.root=.*: {says}") as error:
        ImageClasses(str(tmp_path)).shards()
    assert "\n" not in str(error.value)


def test_zero_padded_numbers_beside_names_are_sorted_as_text(tmp_path):
    fill(tmp_path, **{"00": 1, "07": 1, "10": 1, "other": 1})
    assert ImageClasses(str(tmp_path)).label_of == {"00": 0, "07": 1, "10": 2, "other": 3}


def test_a_limit_and_the_registry(tmp_path):
    fill(tmp_path, a=5, b=5)
    images = build({"name": "image_classes", "root": str(tmp_path), "limit": "4"})
    assert sum(len(list(images.read(shard))) for shard in images.shards()) == 4
    assert {shard.split for shard in images.shards()} == {"validation"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"root": "missing"}, ["images.root=missing", "no such folder"]),
        ({"root": "flat"}, ["images.root=flat", "no class folders", "flat/CLASS/IMAGE"]),
        ({"root": "bare"}, ["images.root=bare", "no images"]),
        ({"root": "loose"}, ["images.root=loose", "1 images are not in a class folder", "'x.jpg'"]),
        ({"root": "ab", "validation_root": "abc"}, ["images.validation_root=abc", "3 class folders", "2 of", "'c'"]),
        ({"root": "ab", "validation_root": "flat"}, ["images.validation_root=flat", "no class folders"]),
        ({"root": "ab", "shard_size": 0}, ["images.shard_size=0"]),
    ],
)
def test_a_wrong_setting_raises_one_line(tmp_path, monkeypatch, settings, says):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "ab", a=1, b=1)
    fill(tmp_path / "abc", a=1, b=1, c=1)
    fill(tmp_path / "bare", a=0)
    fill(tmp_path / "loose", a=1)
    (tmp_path / "loose/x.jpg").write_bytes(b"")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/x.jpg").write_bytes(b"")
    with pytest.raises(UserError) as error:
        ImageClasses(**settings).shards()
    assert all(text in str(error.value) for text in says) and "\n" not in str(error.value)
