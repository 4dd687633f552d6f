import io
import os

import numpy as np
import PIL.Image
import pytest
import simplejpeg

from fmdistill.images import DecodeError, Decoding, build, check, decode, escape, picture, unescape
from fmdistill.mini.photos import photograph
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
def test_escape_is_reversible_and_removes_special_characters(key):
    name = escape(key)
    assert unescape(name) == key
    assert name.isascii() and not set(name) & set("./\\\n\0 :*?")


def test_escape_keeps_keys_distinct():
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
    data = encoded(kind, mode)
    assert np.array_equal(decode(data), np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")))
    assert decode(data).shape == (30, 40, 3) and decode(data).dtype == np.uint8


def test_decoded_pixels_are_the_stored_ones():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert np.array_equal(decode(encoded("PNG")), pixels)


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
def test_bytes_that_cannot_be_decoded_raise_with_a_reason(data):
    with pytest.raises(DecodeError) as error:
        decode(data)
    assert len(str(error.value)) > 10 and " at 0x" not in str(error.value)


def by_pil(data: bytes) -> np.ndarray | None:
    """Return the pixels by PIL alone, None if it raises."""
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception:
        return None


def jpeg(mode: str = "RGB", size: tuple[int, int] = (75, 53), **settings) -> bytes:
    buffer = io.BytesIO()
    picture = PIL.Image.fromarray(photograph("coffee")).resize(size).convert(mode)
    picture.save(buffer, "JPEG", **settings)
    return buffer.getvalue()


JPEGS = [
    jpeg(mode, quality=quality, subsampling=subsampling, progressive=progressive)
    for mode in ("RGB", "L", "CMYK")
    for quality in (30, 90, 100)
    for subsampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")
    for progressive in (False, True)
]
JPEGS += [jpeg(quality=90, keep_rgb=True), jpeg(size=(1, 1)), jpeg(size=(1, 40)), jpeg(restart_marker_rows=1)]
PIXELS = np.random.default_rng(1).integers(0, 256, (37, 43, 3), dtype=np.uint8)
JPEGS += [simplejpeg.encode_jpeg(PIXELS, 90, colorsubsampling=name) for name in ("440", "411", "420", "422", "444")]


def test_a_jpeg_decodes_to_pils_pixels_bit_for_bit():
    for data in JPEGS:
        assert np.array_equal(decode(data), by_pil(data))
    plain = [picture._plain_jpeg(data, Decoding()) is not None for data in JPEGS]
    assert plain == [i not in range(48, 72) for i in range(len(JPEGS))]  # all but CMYK use the fast decoder


def test_a_broken_jpeg_raises_if_it_does_in_pil_and_else_has_pils_pixels():
    rng, outcomes = np.random.default_rng(3), {"error": 0, "PIL's": 0, "plain": 0}
    for _ in range(600):
        data = bytearray(JPEGS[rng.integers(48)])
        position = int(rng.integers(2, len(data) if rng.random() < 0.5 else 640))
        kind = rng.integers(4)
        if kind == 0:
            data[position] = int(rng.integers(256))
        elif kind == 1:
            del data[position : position + int(rng.integers(1, 9))]
        elif kind == 2:
            data[position:position] = rng.bytes(3)
        else:
            del data[position:]
        expected = by_pil(bytes(data))
        if expected is None:
            outcomes["error"] += 1
            with pytest.raises(DecodeError):
                decode(bytes(data))
        else:
            outcomes["plain" if picture._plain_jpeg(bytes(data), Decoding()) is not None else "PIL's"] += 1
            assert np.array_equal(decode(bytes(data)), expected)
    assert min(outcomes.values()) > 30, outcomes


def test_decoded_pixels_may_be_written_to():
    for kind in ("PNG", "JPEG"):
        assert decode(encoded(kind)).flags.writeable


def fill(root, count):
    for i in range(count):
        (root / f"{i}.jpg").write_bytes(encoded("JPEG", size=(8, 8)))
    return {"name": "folder", "root": str(root), "validation": 0.3, "shard_size": 4}


@pytest.mark.parametrize("limit", [1, 5, 7, 1000, None])
def test_limit_cuts_each_split_and_preserves_the_order(tmp_path, limit):
    settings = fill(tmp_path, 24)
    images, everything = build({**settings, "limit": limit}), build(settings)
    for split in ("train", "validation"):
        cut = [i.key for shard in images.shards() if shard.split == split for i in images.read(shard)]
        whole = [i.key for shard in everything.shards() if shard.split == split for i in everything.read(shard)]
        assert cut == whole[:limit] and len(whole) > 1


def test_a_shard_is_cut_only_if_the_limit_is_inside_it(tmp_path):
    settings = fill(tmp_path, 24)
    whole = [shard for shard in build(settings).shards() if shard.split == "train"]
    first = build(settings).source.count(whole[0].name)
    (shard,) = [s for s in build({**settings, "limit": first}).shards() if s.split == "train"]
    assert shard == whole[0] and shard.take is None


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
