"""Tests of decoding: for every kind of image, the pixels by an independent computation or the reason for an error."""

import io
import logging
import struct
import threading
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from fmdistill.images import DecodeError, Decoding, build, check
from fmdistill.images.picture import FORMATS, HEAD, SUFFIXES, decode, is_image, read, summary
from fmdistill.registry import UserError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)


def saved(image: PIL.Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def png(depth: int, colour: int, rows: list[bytes], trns: bytes = b"") -> bytes:
    """Return a PNG of the rows as they are stored; `colour` is its colour type."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    width = len(rows[0]) * 8 // depth // {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    clear = chunk(b"tRNS", trns) if trns else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + clear + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(
    width: int, height: int, bits: int, photometric: int, data: bytes, extra: dict[int, int] | None = None
) -> bytes:
    """Return a TIFF of one channel, little endian."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height, 279: len(data)}
    tags |= {273: 8 + 2 + 12 * (len(tags) + 1) + 4}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
SCALED = np.array([round(v / 257) for v in range(65536)]).reshape(256, 256)


@pytest.mark.parametrize(
    "data",
    [
        saved(PIL.Image.fromarray(RAMP), "PNG"),
        saved(PIL.Image.fromarray(RAMP), "TIFF"),
        saved(PIL.Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
        saved(PIL.Image.fromarray(RAMP.astype(">u2")), "TIFF"),
        saved(PIL.Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        tiff(256, 256, 16, 0, (65535 - RAMP).tobytes()),  # white is zero
        b"P5\n256 256\n65535\n" + RAMP.astype(">u2").tobytes(),
    ],
)
def test_a_gray_ramp_of_16_bits_is_scaled_by_257(data):
    pixels, conversions = read(data)
    assert np.array_equal(pixels, gray(SCALED)) and pixels.dtype == np.uint8
    assert conversions == ("depth",)


def test_12_bits_of_a_tiff_are_scaled_by_their_own_range():
    values = np.arange(4096).reshape(64, 64)
    packed = bytearray()
    for a, b in values.reshape(-1, 2):
        packed += bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    expected = np.array([round(v * 255 / 4095) for v in range(4096)]).reshape(64, 64)
    assert np.array_equal(decode(tiff(64, 64, 12, 1, bytes(packed))), gray(expected))


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_whole_numbers_beyond_16_bits_raise_with_their_range(value):
    values = np.full((4, 4), 7, np.int32)
    values[1, 2] = value
    with pytest.raises(DecodeError, match=f"whole numbers from {min(7, value)} to {max(7, value)}: .*0 to 65535"):
        decode(saved(PIL.Image.fromarray(values), "TIFF"))


def test_floats_from_0_to_1_are_black_to_white():
    values = np.linspace(0, 1, 9000, dtype=np.float32).reshape(90, 100)
    pixels, conversions = read(saved(PIL.Image.fromarray(values), "TIFF"))
    assert np.array_equal(pixels, gray(np.floor(values.astype(float) * 255 + 0.5))) and conversions == ("float",)


@pytest.mark.parametrize(("low", "high"), [(0, 1.5), (-0.1, 1), (0, 255), (0, np.nan), (0, np.inf)])
def test_floats_of_another_range_raise_with_it(low, high):
    values = np.array([[low, high]], np.float32)
    with pytest.raises(DecodeError, match=r"floats from .* to .*: expected 0 .black. to 1"):
        decode(saved(PIL.Image.fromarray(values), "TIFF"))


def test_three_channels_of_16_bits_become_their_high_bytes():
    values = RNG.integers(0, 65536, (5, 6, 3)).astype(">u2")
    pixels, conversions = read(png(16, 2, [row.tobytes() for row in values]))
    assert np.array_equal(pixels, values >> 8) and conversions == ("depth",)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha.astype(float)[..., None] / 255
    return np.floor(colours * share + 255 * (1 - share) + 0.5 + 1e-9).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_blended_onto_white(kind):
    alpha = np.arange(COLOURS[..., 0].size).reshape(COLOURS.shape[:2]) % 256
    image = PIL.Image.fromarray(np.dstack([COLOURS, alpha.astype(np.uint8)]))
    pixels, conversions = read(saved(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert np.array_equal(pixels, on_white(COLOURS, alpha)) and conversions == ("alpha",)
    shown = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.abs(pixels.astype(int) - np.asarray(shown)).max() <= 1


def test_gray_with_alpha_is_blended_onto_white():
    alpha = np.arange(COLOURS[..., 0].size).reshape(COLOURS.shape[:2]) % 256
    image = PIL.Image.fromarray(np.dstack([COLOURS[..., 0], alpha.astype(np.uint8)]), "LA")
    assert np.array_equal(decode(saved(image, "PNG")), on_white(gray(COLOURS[..., 0]), alpha))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_image_with_alpha_is_the_image_without_it(mode):
    image = PIL.Image.fromarray(COLOURS).convert(mode)
    pixels, conversions = read(saved(image, "PNG"))
    assert np.array_equal(pixels, np.asarray(image.convert("RGB"))) and conversions == ()


def test_a_palettes_transparency_is_blended_onto_white_if_it_has_any():
    image = PIL.Image.fromarray(COLOURS).quantize(16)
    index = np.asarray(image)
    colours = np.asarray(image.convert("RGB"))
    alphas = np.array([0, 128, *[255] * 14], np.uint8)
    for given, alpha in ((bytes(alphas), alphas[index]), (3, np.where(index == 3, 0, 255)), (bytes([255] * 16), None)):
        pixels, conversions = read(saved(image, "PNG", transparency=given))
        expected = colours if alpha is None else on_white(colours, alpha)
        assert np.array_equal(pixels, expected) and conversions == (() if alpha is None else ("alpha",))


@pytest.mark.parametrize(
    ("depth", "row", "clear", "shown"),
    [
        (1, bytes([0b01010101]), 1, [0, 255, 0, 255, 0, 255, 0, 255]),
        (1, bytes([0b01010101]), 0, [255] * 8),
        (2, bytes([0b00011011]), 2, [0, 85, 255, 255]),
        (4, bytes([0x12, 0x34]), 3, [17, 34, 255, 68]),
        (8, bytes([1, 100, 3, 4]), 100, [1, 255, 3, 4]),
        (16, struct.pack(">4H", 257, 1000, 1001, 65535), 1000, [1, 255, 4, 255]),
    ],
)
def test_the_transparent_gray_level_of_a_png_is_white(depth, row, clear, shown):
    assert decode(png(depth, 0, [row], struct.pack(">H", clear)))[0, :, 0].tolist() == shown


@pytest.mark.parametrize("deep", [False, True])
def test_the_transparent_colour_of_a_png_is_white(deep):
    clear = [int(c) * 256 if deep else int(c) for c in COLOURS[3, 4]]
    stored = (COLOURS.astype(int) * 256).astype(">u2") if deep else COLOURS
    data = png(16 if deep else 8, 2, [row.tobytes() for row in stored], struct.pack(">3H", *clear))
    expected = COLOURS.copy()
    expected[(COLOURS == COLOURS[3, 4]).all(2)] = 255
    assert np.array_equal(decode(data), expected)


def test_cmyk_is_converted_as_pil_does():
    image = PIL.Image.fromarray(COLOURS).convert("CMYK")
    pixels, conversions = read(saved(image, "JPEG"))
    assert np.array_equal(pixels, np.asarray(PIL.Image.open(io.BytesIO(saved(image, "JPEG"))).convert("RGB")))
    assert conversions == ("cmyk",)
    assert np.array_equal(decode(saved(image, "TIFF")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_only_the_first_of_several_frames_is_decoded(kind):
    frames = [PIL.Image.fromarray(np.full((8, 9, 3), level, np.uint8)) for level in (40, 90, 200)]
    settings = {"lossless": True} if kind == "WEBP" else {}
    pixels, conversions = read(saved(frames[0], kind, save_all=True, append_images=frames[1:], **settings))
    assert (pixels == 40).all() and pixels.shape == (8, 9, 3) and conversions == ("frames",)
    assert read(saved(frames[0], kind, **settings)).conversions == ()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_applied_or_ignored(kind, orientation):
    if kind.lower() not in SUFFIXES and kind == "AVIF":
        pytest.skip("this Pillow has no AVIF")
    image = PIL.Image.fromarray(np.kron(COLOURS[:3, :5], np.ones((8, 8, 1), np.uint8)))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {}
    tagged = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif}
    data, plain = saved(image, kind, **tagged, **lossless), saved(image, kind, **lossless)
    stored = np.asarray(PIL.Image.open(io.BytesIO(plain)).convert("RGB"))
    turns = [
        stored,
        stored[:, ::-1],
        stored[::-1, ::-1],
        stored[::-1],
        stored.transpose(1, 0, 2),
        np.rot90(stored, -1),
        np.rot90(stored.transpose(1, 0, 2), 2),
        np.rot90(stored, 1),
    ]
    pixels, conversions = read(data)
    assert np.array_equal(pixels, turns[orientation - 1]) and pixels.flags.writeable
    assert conversions == (() if orientation == 1 else ("turned",))
    assert np.array_equal(read(data, Decoding("ignore")).pixels, stored)
    assert read(data, Decoding("ignore")).conversions == ()
    assert np.array_equal(pixels, PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB"))


def test_an_orientation_only_in_xmp_is_applied_like_pil():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    body = b"http://ns.adobe.com/xap/1.0/\0" + xmp
    plain = saved(PIL.Image.fromarray(COLOURS), "JPEG")
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
    assert np.array_equal(decode(data), np.rot90(decode(plain), -1))


def corrupt_exif(orientation: int = 1) -> bytes:
    """Return a JPEG whose EXIF has an entry that points past its end, which PIL warns of."""
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack(">HHII", 0x010E, 2, 5000, 60_000)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4)
    plain = saved(PIL.Image.fromarray(COLOURS), "JPEG")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]


NOISY = {
    "corrupt EXIF": corrupt_exif(6),
    "palette": saved(PIL.Image.fromarray(COLOURS).quantize(16), "PNG", transparency=bytes([0, 128])),
    "damaged TIFF": saved(PIL.Image.fromarray(COLOURS), "TIFF", compression="tiff_lzw").replace(
        saved(PIL.Image.fromarray(COLOURS), "TIFF", compression="tiff_lzw")[200:400], b"\xff" * 200
    ),
    "samples": saved(PIL.Image.fromarray(COLOURS), "TIFF").replace(
        struct.pack("<HHII", 277, 3, 1, 3), struct.pack("<HHII", 277, 3, 1, 9)
    ),
}


@pytest.mark.parametrize("name", NOISY)
def test_no_warning_of_pil_or_its_libraries_reaches_the_terminal(name, monkeypatch, capfd):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 700)  # PIL warns of images with 960 pixels
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # without pytest's handlers, errors would be printed
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        with pytest.warns() if name == "corrupt EXIF" else warnings.catch_warnings():
            if name == "corrupt EXIF":  # check that the input makes PIL warn
                PIL.Image.open(io.BytesIO(NOISY[name])).getexif()
        try:
            decode(NOISY[name])
        except DecodeError as error:
            assert name in ("damaged TIFF", "samples") and str(error)
    assert [str(warning.message) for warning in raised] == []
    assert capfd.readouterr() == ("", "")


def test_a_corrupt_exif_still_turns_the_image():
    assert np.array_equal(decode(corrupt_exif(6)), np.rot90(decode(corrupt_exif(1)), -1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM"])
def test_more_pixels_than_max_pixels_raise_with_its_name(kind):
    data = saved(PIL.Image.fromarray(COLOURS), kind)
    with pytest.raises(DecodeError, match=r"40 x 24 = 960 pixels, more than images\.max_pixels=959; .*=960"):
        read(data, Decoding(max_pixels=959))
    assert read(data, Decoding(max_pixels=960)).pixels.shape == (24, 40, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM"])
def test_max_pixels_may_exceed_pils_own_limit_which_stays_the_same(kind, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    data = saved(PIL.Image.fromarray(COLOURS), kind)
    with pytest.raises(PIL.Image.DecompressionBombError):
        PIL.Image.open(io.BytesIO(data)).load()
    threads = [threading.Thread(target=lambda: sizes.append(decode(data).shape)) for _ in range(8)]
    sizes: list[tuple] = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [(24, 40, 3)] * 8 and PIL.Image.MAX_IMAGE_PIXELS == 100


def test_the_default_limit_is_pil_s():
    data = png(1, 0, [bytes(20_000 // 8)] * 9500)  # 190 megapixels in a few kilobytes
    with pytest.raises(DecodeError, match=r"20000 x 9500 = 190000000 pixels, more than images\.max_pixels=178956970"):
        decode(data)


def test_the_settings_apply_to_every_source_and_its_identity():
    settings = {"name": "captioned", "train": 2, "validation": 1, "size": 16}
    images = build({**settings, "max_pixels": "255", "orientation": "ignore", "limit": 1})
    (shard,) = [shard for shard in images.shards() if shard.split == "train"]
    (image,) = images.read(shard)
    with pytest.raises(DecodeError, match="images.max_pixels=255"):
        images.picture(image)
    with pytest.raises(UserError, match=r"train-000: image 'captioned-train-000000' cannot be decoded: 16 x 16"):
        images.decode(image, shard.name)
    plain = build(settings)
    assert np.array_equal(plain.decode(image, shard.name), decode(image.data))
    assert plain.identity()["decoding"]["orientation"] == "apply" and plain.identity() != images.identity()
    assert build({**settings, "max_pixels": 7}).identity() == plain.identity()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"orientation": "turn"}, "images.orientation='turn': unknown.*apply, ignore"),
        ({"max_pixels": 0}, "images.max_pixels=0: expected at least 1"),
        ({"max_pixels": "many"}, "images.max_pixels='many': expected int"),
    ],
)
def test_a_wrong_setting_is_named(setting, says):
    with pytest.raises(UserError, match=says):
        check({"name": "folder", "root": "x", **setting})


def test_an_image_is_recognized_by_its_first_bytes():
    image = PIL.Image.fromarray(COLOURS)
    for kind, suffixes in FORMATS.items():
        if set(suffixes) & set(SUFFIXES):
            assert is_image(saved(image, kind)[:HEAD]), kind
            assert decode(saved(image, kind)).shape == COLOURS.shape
    for kind in ("L", "1"):
        assert is_image(saved(image.convert(kind), "PPM")[:HEAD])
    for data in (b"", b"BM", b"BMW is a car of Bavaria and more", b"P1 is no image", b"GIF", b"RIFF....WAVE", b"{}"):
        assert not is_image(data), data


def test_the_summary_of_conversions_is_one_line():
    assert summary({}, 5) == ""
    assert summary({"turned": 2, "depth": 8}, 1000) == (
        "of 1000 images: 8 scaled from 16 bits a channel to 8, 2 turned as the EXIF orientation says"
    )
