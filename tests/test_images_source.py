import io
import os

import numpy as np
import PIL.Image
import pytest

from fmdistill.images import DecodeError, build, check, decode, escape, unescape
from fmdistill.registry import UserError

KEYS = [
    "a.jpg",
    "a.b.c/d.tar.jpg",
    "../../etc/passwd",
    "/absolute",
    "",
    ".",
    "%2E",
    "%",
    "%%2F%",
    "a b\tc\nd\0e",
    "CON",
    "A.JPG",
    "\u00fc/\u732b/\U0001f408.png",
    "u\u0308.png",
    "a+b&c=d?e#f",
    "-rf",
    "~",
    "a\\b",
    os.fsdecode(b"\xff\xfe.jpg"),
]


@pytest.mark.parametrize("key", KEYS)
def test_escape_is_reversible_and_leaves_nothing_that_a_tar_or_webdataset_reads(key):
    name = escape(key)
    assert unescape(name) == key
    assert name.isascii() and not set(name) & set("./\\\n\0 :*?")


def test_escape_keeps_keys_apart():
    assert len({escape(key) for key in KEYS}) == len(KEYS)


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"), ("WEBP", "RGB")],
)
def test_every_mode_becomes_rgb(kind, mode):
    image = decode(encoded(kind, mode))
    assert image.mode == "RGB" and image.size == (40, 30)


def test_decoded_pixels_are_the_stored_ones():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode(encoded("PNG"))), pixels)


def test_an_exif_orientation_is_not_applied():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue()).size == (40, 30)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        encoded("JPEG")[:300],
        encoded("JPEG")[:-200],
        encoded("PNG")[:-200],
        encoded("WEBP")[:60],
        b"\xff\xd8\xff\xe0" + bytes(100),
        encoded("PNG")[:33] + b"\xff" * 200,
    ],
)
def test_bytes_that_cannot_be_decoded_say_why(data):
    with pytest.raises(DecodeError) as error:
        decode(data)
    assert len(str(error.value)) > 10


def test_a_decompression_bomb_is_an_image_that_cannot_be_decoded(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DecodeError, match="DecompressionBomb"):
        decode(encoded("PNG"))


def fill(root, count):
    for i in range(count):
        (root / f"{i}.jpg").write_bytes(encoded("JPEG", size=(8, 8)))
    return {"name": "folder", "root": str(root), "validation": 0.3, "shard_size": 4}


@pytest.mark.parametrize("limit", [1, 5, 7, 1000, None])
def test_limit_cuts_each_split_without_touching_the_order(tmp_path, limit):
    settings = fill(tmp_path, 24)
    images, everything = build({**settings, "limit": limit}), build(settings)
    for split in ("train", "validation"):
        cut = [i.key for shard in images.shards() if shard.split == split for i in images.read(shard)]
        whole = [i.key for shard in everything.shards() if shard.split == split for i in everything.read(shard)]
        assert cut == whole[:limit] and len(whole) > 1


def test_a_shard_is_cut_only_where_the_limit_falls_inside_it(tmp_path):
    settings = fill(tmp_path, 24)
    whole = [shard for shard in build(settings).shards() if shard.split == "train"]
    first = build(settings).source.count(whole[0].name)
    (kept,) = [shard for shard in build({**settings, "limit": first}).shards() if shard.split == "train"]
    assert kept == whole[0] and kept.take is None


@pytest.mark.parametrize("limit", ["0", "-3", "many", 1.5, True])
def test_a_wrong_limit_is_named(limit):
    with pytest.raises(UserError, match="images.limit"):
        check({"name": "folder", "root": "x", "limit": limit})


def test_check_touches_no_data():
    check({"name": "folder", "root": "no/such/folder"})
    check({"name": "tar", "root": "s3://no-such-bucket", "train": "a_{0..9}.tar"})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "foldr", "root": "x"}, "images.name: unknown name 'foldr'. Did you mean 'folder'"),
        ({"name": "folder"}, "images.root: required"),
        ({"name": "folder", "root": "x", "shard_sise": 3}, "images.shard_sise: .*Did you mean 'shard_size'"),
        ({"name": "folder", "root": 7}, "images.root=7: expected str, got int; quote it"),
        ({"root": "x"}, "images: needs a `name`"),
    ],
)
def test_a_wrong_setting_is_named(settings, says):
    with pytest.raises(UserError, match=says):
        check(settings)
