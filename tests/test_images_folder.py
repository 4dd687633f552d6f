import logging
import os
from pathlib import Path

import PIL.Image
import pytest

from fmdistill.images import decode
from fmdistill.images.folder import ImageFolder, by_suffix, validation_share
from fmdistill.images.picture import SUFFIXES
from fmdistill.registry import UserError


def fill(root: Path, count: int, pattern: str = "d{0}/image_{1}.jpg") -> list[str]:
    """Write `count` files whose bytes are their keys; a folder lists names, so they need not be images."""
    keys = [pattern.format(i % 3, i) for i in range(count)]
    for key in keys:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(key.encode())
    return keys


def contents(folder: ImageFolder) -> dict[str, list[str]]:
    return {name: [image.key for image in folder.read(name)] for names in folder.shards().values() for name in names}


def test_every_image_is_in_one_shard_and_fetch_equals_read(tmp_path):
    keys = fill(tmp_path, 60)
    folder = ImageFolder(str(tmp_path), validation=0.2, shard_size=8)
    shards = contents(folder)
    assert sorted(key for shard in shards.values() for key in shard) == sorted(keys)
    for name, shard in shards.items():
        assert 0 < len(shard) <= 8 and folder.count(name) == len(shard) and shard == sorted(shard)
        assert folder.keys(name) == shard
        for image in folder.read(name):
            assert folder.fetch(name, image.key) == image and image.data == image.key.encode()
    with pytest.raises(KeyError):
        folder.fetch(name, "no/such.jpg")


def test_the_hash_is_stable(tmp_path):
    fill(tmp_path, 12, "{1}.png")
    shards = contents(ImageFolder(str(tmp_path), validation=0.2, shard_size=4))
    # Written down once: another value means that every cache of a folder is redone.
    assert {name: [key[:-4] for key in keys] for name, keys in shards.items()} == STABLE


def test_an_added_file_touches_one_shard_or_splits_one_and_keeps_every_split(tmp_path):
    fill(tmp_path, 40)
    before = contents(ImageFolder(str(tmp_path), validation=0.25, shard_size=4))
    splits = 0
    for i in range(30):
        (tmp_path / f"added_{i}.webp").write_bytes(b"x")
        after = contents(ImageFolder(str(tmp_path), validation=0.25, shard_size=4))
        gone = [name for name in before if name not in after]
        changed = [name for name in before if name in after and after[name] != before[name]]
        new = [name for name in after if name not in before]
        assert len(gone) + len(changed) <= 1
        if gone:
            assert all(name.startswith(gone[0].replace("-all", "-")) for name in new)
            splits += 1
        split = {key: name.partition("-")[0] for name, keys in after.items() for key in keys}
        assert all(split[key] == name.partition("-")[0] for name, keys in before.items() for key in keys)
        before = after
    assert splits > 0


def test_one_shard_is_called_all(tmp_path):
    fill(tmp_path, 3)
    assert ImageFolder(str(tmp_path), validation=0.0).shards() == {"train": ["train-all"], "validation": []}


def test_validation_is_about_the_fraction_and_only_grows_with_it(tmp_path):
    fill(tmp_path, 1000)
    held_out = {}
    for fraction in (0.1, 0.3):
        shards = contents(ImageFolder(str(tmp_path), validation=fraction))
        held_out[fraction] = {key for name, keys in shards.items() if name.startswith("validation") for key in keys}
        assert abs(len(held_out[fraction]) / 1000 - fraction) < 0.05
    assert held_out[0.1] < held_out[0.3]


def test_split_and_shard_are_drawn_apart(tmp_path):
    fill(tmp_path, 1000)
    shards = ImageFolder(str(tmp_path), validation=0.3, shard_size=300).shards()
    # If both came from the same bits, validation's shards would share their first bits.
    assert {name[-1] for name in shards["validation"]} == {"0", "1"} or shards["validation"] == ["validation-all"]
    assert {name.split("-")[1][0] for name in shards["train"]} == {"0", "1"}


def test_suffixes_in_any_case_and_nothing_hidden(tmp_path):
    for name in ("a.JPG", "b.Jpeg", "c.webp", "d.TIFF", "e.bmp", "f.tif", "g.png", "h.v1.jpg"):
        (tmp_path / name).write_bytes(b"")
    for name in ("._a.jpg", ".hidden.png", "note.txt", "jpg", "x.jpg.part"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / ".thumbs" / "t.jpg").write_bytes(b"")
    keys = contents(ImageFolder(str(tmp_path), validation=0))["train-all"]
    assert keys == ["a.JPG", "b.Jpeg", "c.webp", "d.TIFF", "e.bmp", "f.tif", "g.png", "h.v1.jpg"]


def test_decodable_files_are_images_and_one_line_counts_the_others_by_suffix(tmp_path, caplog):
    image = PIL.Image.new("RGB", (8, 6), "red")
    kinds = {"a.gif": "GIF", "b.jfif": "JPEG", "c.JPE": "JPEG", "d.ppm": "PPM", "e": "JPEG", "f": "PNG", "g.pgm": "PPM"}
    if "avif" in SUFFIXES:
        kinds["h.avif"] = "AVIF"
    for name, kind in kinds.items():
        image.save(tmp_path / name, kind)
    (tmp_path / "linked").symlink_to("e")  # is the image e, once
    for name in ("x.heic", "y.HEIC", "z.heic", "x.json", "notes", "x.jpg.part", "broken link"):
        (tmp_path / name).write_bytes(b"no image")
    os.mkfifo(tmp_path / "pipe")
    with caplog.at_level("WARNING"):
        folder = ImageFolder(str(tmp_path), validation=0)
        images = list(folder.read("train-all"))
        ImageFolder(str(tmp_path), validation=0).shards()  # logs nothing a second time
    assert [image.key for image in images] == sorted(kinds)
    assert all(decode(image.data).shape == (6, 8, 3) for image in images)
    (record,) = caplog.records
    assert ": ignored 3 without a suffix, 3 .heic, 1 .json, 1 .part; images are jpg," in record.getMessage()


def test_files_that_usually_accompany_images_are_counted_without_a_warning(tmp_path, caplog):
    fill(tmp_path, 2)
    for name in ("a.txt", "a.json", "b.json"):
        (tmp_path / name).write_bytes(b"{}")
    with caplog.at_level("INFO"):
        ImageFolder(str(tmp_path), validation=0).shards()
    assert [(r.levelname, r.getMessage().partition(": ")[2].partition(";")[0]) for r in caplog.records] == [
        ("INFO", "ignored 2 .json, 1 .txt")
    ]


def test_of_many_suffixes_the_most_frequent_are_named():
    counts = {f"s{number}": 20 - number for number in range(11)}
    text = by_suffix(counts)
    assert text.startswith("20 .s0, 19 .s1, ") and text.endswith("13 .s7, 33 of 3 other suffixes")


def test_an_image_reached_by_several_links_has_one_key(tmp_path, caplog):
    root, outside = tmp_path / "root", tmp_path / "outside"
    fill(root, 4)
    fill(outside, 2, "o{1}.jpg")
    (root / "a_loop").symlink_to(root)
    (root / "d0" / "up").symlink_to("..")
    (root / "a_folder").symlink_to("d2")
    (root / "a_self").symlink_to("a_self")
    (root / "a_again.jpg").symlink_to("d0/image_0.jpg")
    (root / "linked").symlink_to(outside)
    (root / "linked_too").symlink_to(outside)
    (root / "linked.jpg").symlink_to(outside / "o0.jpg")
    (root / "broken.jpg").symlink_to("nowhere.jpg")
    with caplog.at_level(logging.WARNING):
        keys = contents(ImageFolder(str(root), validation=0))["train-all"]
    own = ["d0/image_0.jpg", "d0/image_3.jpg", "d1/image_1.jpg", "d2/image_2.jpg"]
    assert keys == [*own, "linked/o0.jpg", "linked/o1.jpg"]
    assert "ignored 1 broken links to images" in caplog.text


def test_validation_root_is_its_own_folder(tmp_path):
    fill(tmp_path / "train", 3)
    fill(tmp_path / "val", 2)
    (tmp_path / "val" / "d0/image_0.jpg").write_bytes(b"another")
    folder = ImageFolder(str(tmp_path / "train"), validation_root=str(tmp_path / "val"))
    assert folder.shards() == {"train": ["train-all"], "validation": ["validation-all"]}
    assert folder.fetch("validation-all", "d0/image_0.jpg").data == b"another"
    assert folder.fetch("train-all", "d0/image_0.jpg").data == b"d0/image_0.jpg"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"root": "missing"}, ["images.root=missing", "no such folder", "webp"]),
        ({"root": "empty"}, ["images.root=empty", "no images", "tiff"]),
        ({"root": "some", "validation": 1.0}, ["images.validation=1.0"]),
        ({"root": "some", "shard_size": 0}, ["images.shard_size=0"]),
        ({"root": "some", "validation": 1e-9}, ["images.validation=1e-09", "0 are for validation"]),
        ({"root": "some", "validation_root": "some/d0"}, ["images.validation_root=some/d0", "inside"]),
        ({"root": "some", "validation_root": "empty"}, ["images.validation_root=empty", "no images"]),
        ({"root": "some", "validation_root": "empty", "validation": 0.5}, ["images.validation=0.5", "one of the two"]),
    ],
)
def test_a_wrong_setting_raises_one_line(tmp_path, monkeypatch, settings, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "some", 3)
    with pytest.raises(UserError) as error:
        ImageFolder(**settings).shards()
    assert all(text in str(error.value) for text in says) and "\n" not in str(error.value)


def test_a_file_that_vanished_is_named(tmp_path):
    fill(tmp_path, 2, "{1}.jpg")
    folder = ImageFolder(str(tmp_path), validation=0)
    folder.shards()
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"1\.jpg: cannot be read"):
        list(folder.read("train-all"))


def test_names_that_are_not_utf8(tmp_path):
    try:
        with open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb") as file:
            file.write(b"bytes")
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    folder = ImageFolder(str(tmp_path), validation=0)
    (image,) = folder.read("train-all")
    assert image.key == os.fsdecode(b"\xff.jpg") and image.data == b"bytes"


STABLE = {
    "train-00": ["0", "5", "9"],
    "train-01": ["10", "11", "3"],
    "train-10": ["2", "6", "7", "8"],
    "train-11": ["1"],
    "validation-all": ["4"],
}


@pytest.mark.parametrize(("images", "held_out"), [(2, 1), (8, 2), (100, 10), (1000, 37)])
def test_a_share_is_computed_that_holds_out_so_many_images(tmp_path, images, held_out):
    keys = fill(tmp_path, images)
    share = validation_share(keys, held_out)
    folder = ImageFolder(str(tmp_path), validation=share)
    assert sum(folder.count(shard) for shard in folder.shards()["validation"]) == held_out
    assert share == round(share, 5) and abs(share - held_out / images) < 1 / images**0.5
