"""Decoding: an image's bytes become uint8 RGB pixels by one rule for each kind of image (docs/images.md).

Letters: H, W height and width.
"""

import ctypes
import io
import logging
import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageFile
import simplejpeg

FORMATS = {  # PIL's name of each supported format, with the suffixes of its files
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "GIF": ("gif",),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "AVIF": ("avif",),
}
OPTIONAL = ("webp", "avif")  # not every build of Pillow has them
DECODED = [name for name in FORMATS if name.lower() not in OPTIONAL or PIL.features.check(name.lower())]
SUFFIXES = tuple(suffix for name in DECODED for suffix in FORMATS[name])  # of image files, in upper or lower case
HEAD = 32  # first bytes of a file, from which `is_image` recognizes an image
HEADS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|BM....\0\0\0\0|II[*+]\0|MM\0[*+]|GIF8[79]a|P[1-6]\s+[#\d]"
    rb"|....ftypavi[fs]",
    re.DOTALL,
)
ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")  # of an object in an error message, different in each process
MAX_PIXELS = 178_956_970  # PIL's default limit
RULES = 1  # version of the rules, incremented when the pixels of any image change
CONVERSIONS = {
    "depth": "scaled from 16 bits a channel to 8",
    "float": "scaled from floats between 0 and 1",
    "alpha": "with transparency laid on white",
    "cmyk": "converted from CMYK",
    "turned": "turned as the EXIF orientation says",
    "frames": "of several frames cut to the first",
}
ORIENTATION = 0x0112  # the EXIF and TIFF tag
UPRIGHT = 1
INVERSE = {6: 8, 8: 6}  # the orientation that reverses an orientation; the others reverse themselves
DEEP = re.compile(r";16[BLN]")  # in PIL's raw modes: 16 bits a channel, of which PIL decodes 8
PNG_STEP = {"L;2": 85, "L;4": 17}  # between two gray levels by raw mode: PIL does not scale `transparency`

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else errors of the TIFF reader are printed to stderr
_PIL_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # an entry of `warnings.filters`
_pixel_limit = threading.Lock()


@dataclass(frozen=True)
class Decoding:
    """The rules that a recipe chooses: whether to apply the EXIF orientation, and the most pixels of an image."""

    orientation: Literal["apply", "ignore"] = "apply"
    max_pixels: int = MAX_PIXELS

    def identity(self) -> dict:
        """Return the settings that determine pixels."""
        return {"rules": RULES, "orientation": self.orientation}


class Picture(NamedTuple):
    """A decoded image: pixels, uint8 (H, W, 3) RGB, and the CONVERSIONS that made them."""

    pixels: np.ndarray
    conversions: tuple[str, ...]


class DecodeError(ValueError):
    """An image's bytes cannot be decoded; the message gives the reason."""


def decode(data: bytes) -> np.ndarray:
    """Return the image's pixels, uint8 (H, W, 3) RGB, by the default rules. Raises DecodeError like `read`."""
    return read(data).pixels


def read(data: bytes, decoding: Decoding = Decoding()) -> Picture:
    """Decode an image. Raises DecodeError if the bytes are not a complete image, or if no rule covers it."""
    if (pixels := _plain_jpeg(data, decoding)) is not None:
        return _turned(pixels, [], _jpeg_orientation(data, decoding), decoding)
    _silence()
    try:
        with _open(data, decoding) as image:
            return _picture(image, decoding)
    except DecodeError:
        raise
    except Exception as error:  # PIL raises a dozen types for a broken file, including struct.error and SyntaxError
        reason = ADDRESS.sub("these bytes", str(error))  # sidecars store it, and must be equal for equal images
        raise DecodeError(f"{type(error).__name__}: {reason}") from error


def is_image(head: bytes) -> bool:
    """Return whether a file with these first HEAD bytes is an image of one of FORMATS."""
    return HEADS.match(head) is not None


def summary(counts: Mapping[str, int], images: int) -> str:
    """Return one line with the number of images of each conversion; "" if none was converted."""
    kinds = [f"{counts[name]} {text}" for name, text in CONVERSIONS.items() if counts.get(name)]
    return f"of {images} images: {', '.join(kinds)}" if kinds else ""


def _plain_jpeg(data: bytes, decoding: Decoding) -> np.ndarray | None:
    """Decode an ordinary JPEG to the same pixels as PIL in two thirds of the time; return None for all other images.

    Those are left to PIL: CMYK, for which simplejpeg computes other colours, and JPEGs with libjpeg warnings.
    """
    if not data.startswith(b"\xff\xd8\xff"):  # PIL's test for a JPEG
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in ("YCbCr", "Gray", "RGB"):
        return None
    _check_size(int(width), int(height), decoding)
    try:
        return simplejpeg.decode_jpeg(data)
    except ValueError:
        return None


def _jpeg_orientation(data: bytes, decoding: Decoding) -> int:
    header = _jpeg_header(data)
    if b"Exif\0\0" not in header and b"tiff:Orientation" not in header:  # as in most JPEGs: skip PIL's slow reader
        return UPRIGHT
    _silence()
    try:
        with _open(data, decoding) as image:
            return _orientation(image)
    except Exception:  # the pixels are complete, so a damaged header only loses the orientation
        return UPRIGHT


def _jpeg_header(data: bytes) -> bytes:
    """Return a JPEG's bytes before its scan; all bytes if its segments do not lead to one."""
    position = 2
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] != b"\xda":
        position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))
    return data[:position] if data[position : position + 2] == b"\xff\xda" else data


def _silence() -> None:
    """Ignore PIL's warnings in all threads, which `warnings.catch_warnings` cannot do."""
    if _PIL_FILTER not in warnings.filters:  # checked each time, since catch_warnings restores older filters
        warnings.filterwarnings("ignore", module=_PIL_FILTER[3].pattern)


def _silence_libtiff() -> None:
    """Stop libtiff from printing errors to the terminal; PIL raises for them too."""
    try:
        ctypes.CDLL(PIL.Image.core.__file__).TIFFSetErrorHandler(None)
    except (AttributeError, OSError):  # a Pillow built without libtiff, or that does not export its symbols
        pass


_silence_libtiff()


def _open(data: bytes, decoding: Decoding) -> PIL.ImageFile.ImageFile:
    """Open an image of one of FORMATS. Raises DecodeError if it has too many pixels.

    PIL reads no header of an image above its own limit, so that limit is suspended while `max_pixels` is checked.
    """
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=DECODED)
        _check_size(image.width, image.height, decoding)
    except PIL.Image.DecompressionBombError:
        with _pixel_limit:
            limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
            try:
                image = PIL.Image.open(io.BytesIO(data), formats=DECODED)
                _check_size(image.width, image.height, decoding)
                image.load_prepare()  # here the TIFF reader checks the limit again
            finally:
                PIL.Image.MAX_IMAGE_PIXELS = limit
    return image


def _check_size(width: int, height: int, decoding: Decoding) -> None:
    if width * height > decoding.max_pixels:
        raise DecodeError(
            f"{width} x {height} = {width * height} pixels, more than images.max_pixels={decoding.max_pixels}; "
            f"allow it with images.max_pixels={width * height}"
        )


def _picture(image: PIL.Image.Image, decoding: Decoding) -> Picture:
    raw = _raw_mode(image)
    turned_by_pil = image.format == "TIFF"  # `load` applies the orientation
    orientation = _orientation(image) if turned_by_pil else UPRIGHT
    image.load()
    conversions = ["depth"] if DEEP.search(raw) else []
    if image.mode == "F":
        pixels, conversions = _from_float(np.asarray(image)), ["float"]
    elif image.mode.startswith("I"):
        pixels, conversions = _from_16_bits(image), ["depth"]
    else:
        pixels = np.array(image.convert("RGB"))
    if image.has_transparency_data:
        on_white = _on_white(image, pixels, raw)
        if on_white is not None:
            pixels, conversions = on_white, [*conversions, "alpha"]
    if image.mode == "CMYK":
        conversions.append("cmyk")
    if _is_animated(image):
        conversions.append("frames")
    if not turned_by_pil:
        return _turned(pixels, conversions, _orientation(image), decoding)
    if decoding.orientation == "ignore":
        return Picture(_turn(pixels, INVERSE.get(orientation, orientation)), tuple(conversions))
    turned = ["turned"] if orientation != UPRIGHT else []
    return Picture(pixels, (*conversions, *turned))


def _raw_mode(image: PIL.Image.Image) -> str:
    """Return PIL's raw mode of the file's pixels, such as "RGB;16B"; "" if the format has none."""
    for tile in getattr(image, "tile", []):
        mode = tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3]
        return mode if isinstance(mode, str) else ""
    return ""


def _from_16_bits(image: PIL.Image.Image) -> np.ndarray:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DecodeError(
            f"whole numbers from {low} to {high}: one channel is read as 16 bits, 0 to 65535; store it with 8 or 16"
        )
    tags = getattr(image, "tag_v2", {})
    largest = 4095 if tuple(tags.get(258) or ()) == (12,) else 65535  # 258: TIFF's bits per sample
    values = values.astype(np.uint32)
    if tags.get(262) == 0:  # TIFF's WhiteIsZero, which PIL inverts only for 8 bits
        values = largest - values
    gray = (values * 510 + largest) // (2 * largest)  # rounded to the nearest; no value is halfway
    return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)


def _from_float(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # also true if a value is NaN
        raise DecodeError(
            f"floats from {low:g} to {high:g}: expected 0 (black) to 1 (white); scale them, or store whole numbers"
        )
    gray = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def _on_white(image: PIL.Image.Image, pixels: np.ndarray, raw: str) -> np.ndarray | None:
    """Blend the pixels onto white by their transparency; return None if the image is opaque everywhere."""
    key: Any = image.info.get("transparency")
    if image.mode in ("1", "L", "RGB") or image.mode.startswith("I"):  # `key` is the one transparent colour
        values = np.asarray(image)
        if image.mode == "1":
            values = values * np.uint8(255)  # PIL has scaled the key alike
        if image.mode == "RGB" and DEEP.search(raw):
            key = tuple(channel >> 8 for channel in key)
        elif image.mode == "L":
            key = key * PNG_STEP.get(raw, 1)
        clear = (values == np.asarray(key)).reshape(*values.shape[:2], -1).all(2)
        return np.where(clear[..., None], np.uint8(255), pixels) if clear.any() else None
    rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
    alpha = rgba[..., 3:]
    if (alpha == 255).all():
        return None
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _is_animated(image: PIL.Image.Image) -> bool:
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))  # a phone's JPEG with a thumbnail
    except Exception:  # a broken second frame
        return True


def _orientation(image: PIL.Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, UPRIGHT)
    except Exception:  # damaged EXIF
        return UPRIGHT
    return value if isinstance(value, int) and value in range(1, 9) else UPRIGHT


def _turned(pixels: np.ndarray, conversions: list[str], orientation: int, decoding: Decoding) -> Picture:
    if orientation == UPRIGHT or decoding.orientation == "ignore":
        return Picture(pixels, tuple(conversions))
    return Picture(_turn(pixels, orientation), (*conversions, "turned"))


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Flip and rotate the pixels by an EXIF orientation from 1 to 8."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
