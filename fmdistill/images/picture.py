"""What a picture is: an image's bytes become uint8 RGB pixels by one rule for each kind of image (docs/images.md).

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

FORMATS = {  # PIL's name of each format that is decoded, with the suffixes of its files
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "GIF": ("gif",),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "AVIF": ("avif",),
}
OPTIONAL = ("webp", "avif")  # which not every Pillow is built with
DECODED = [name for name in FORMATS if name.lower() not in OPTIONAL or PIL.features.check(name.lower())]
SUFFIXES = tuple(suffix for name in DECODED for suffix in FORMATS[name])  # of image files, in any case
HEAD = 32  # bytes from which `is_image` knows an image
HEADS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|BM....\0\0\0\0|II[*+]\0|MM\0[*+]|GIF8[79]a|P[1-6]\s+[#\d]"
    rb"|....ftypavi[fs]",
    re.DOTALL,
)
ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")  # of an object in a library's message, another in each process
MAX_PIXELS = 178_956_970  # above which PIL refuses an image by default
RULES = 1  # raised when the pixels of any image change
CONVERSIONS = {
    "depth": "scaled from 16 bits a channel to 8",
    "float": "scaled from floats between 0 and 1",
    "alpha": "with transparency laid on white",
    "cmyk": "converted from CMYK",
    "turned": "turned as the EXIF orientation says",
    "frames": "of several frames cut to the first",
}
ORIENTATION = 0x0112  # the EXIF and TIFF tag
UNTURNED = 1
BACK = {6: 8, 8: 6}  # the turn that undoes a turn; the others undo themselves
DEEP = re.compile(r";16[BLN]")  # in PIL's name of how a file stores pixels: 16 bits a channel, of which it keeps 8
PNG_STEP = {"L;2": 85, "L;4": 17}  # between two gray levels of so many bits, which PIL does not scale in `transparency`

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else an error of the TIFF reader is printed as it is
_PIL_IS_SILENT = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as `warnings` lists a filter
_lifting = threading.Lock()


@dataclass(frozen=True)
class Decoding:
    """The rules that users choose: whether the EXIF orientation is applied, and how many pixels an image may have."""

    orientation: Literal["apply", "ignore"] = "apply"
    max_pixels: int = MAX_PIXELS

    def identity(self) -> dict:
        """Return what decides pixels."""
        return {"rules": RULES, "orientation": self.orientation}


class Picture(NamedTuple):
    """A decoded image: uint8 (H, W, 3) RGB, and the names in CONVERSIONS of what was done to it."""

    pixels: np.ndarray
    conversions: tuple[str, ...]


class DecodeError(ValueError):
    """An image's bytes cannot be decoded; the message says why."""


def decode(data: bytes) -> np.ndarray:
    """Return the image's pixels, uint8 (H, W, 3) RGB, by the default rules; DecodeError as `read` raises."""
    return read(data).pixels


def read(data: bytes, decoding: Decoding = Decoding()) -> Picture:
    """Decode an image. DecodeError if the bytes are no whole image, or one that no rule covers."""
    if (pixels := _plain_jpeg(data, decoding)) is not None:
        return _turned(pixels, [], _jpeg_orientation(data, decoding), decoding)
    _silence()
    try:
        with _open(data, decoding) as image:
            return _picture(image, decoding)
    except DecodeError:
        raise
    except Exception as error:  # PIL raises a dozen types for a broken file, struct.error and SyntaxError among them
        reason = ADDRESS.sub("these bytes", str(error))  # a sidecar stores it: equal images make equal sidecars
        raise DecodeError(f"{type(error).__name__}: {reason}") from error


def is_image(head: bytes) -> bool:
    """Return whether a file with these first HEAD bytes is an image of one of FORMATS."""
    return HEADS.match(head) is not None


def summary(counts: Mapping[str, int], images: int) -> str:
    """Return one line that says how many of the images were converted and how; "" if none was."""
    kinds = [f"{counts[name]} {text}" for name, text in CONVERSIONS.items() if counts.get(name)]
    return f"of {images} images: {', '.join(kinds)}" if kinds else ""


def _plain_jpeg(data: bytes, decoding: Decoding) -> np.ndarray | None:
    """Return a sound JPEG's pixels, PIL's own in two thirds of the time; None for what is left to PIL.

    That is CMYK, of which simplejpeg makes other colours, and whatever makes libjpeg warn.
    """
    if not data.startswith(b"\xff\xd8\xff"):  # as PIL knows a JPEG
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
    if b"Exif\0\0" not in header and b"tiff:Orientation" not in header:  # most: then PIL need not read it
        return UNTURNED
    _silence()
    try:
        with _open(data, decoding) as image:
            return _orientation(image)
    except Exception:  # the pixels are whole, so an odd header only loses its orientation
        return UNTURNED


def _jpeg_header(data: bytes) -> bytes:
    """Return what lies before the pixels, or all of it if its segments do not follow each other as usual."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":
        place += 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
    return data[:place] if data[place : place + 2] == b"\xff\xda" else data


def _silence() -> None:
    """Keep PIL's warnings off the terminal: for all threads, since `warnings.catch_warnings` works for one alone."""
    if _PIL_IS_SILENT not in warnings.filters:  # again after a block of catch_warnings has put back older filters
        warnings.filterwarnings("ignore", module=_PIL_IS_SILENT[3].pattern)


def _silence_libtiff() -> None:
    """Keep libtiff's own lines off the terminal, of which PIL leaves the errors on; it raises for them too."""
    try:
        ctypes.CDLL(PIL.Image.core.__file__).TIFFSetErrorHandler(None)
    except (AttributeError, OSError):  # a Pillow that is built without libtiff, or hides it
        pass


_silence_libtiff()


def _open(data: bytes, decoding: Decoding) -> PIL.ImageFile.ImageFile:
    """Open an image of one of FORMATS; DecodeError if it has too many pixels.

    Beyond its own limit PIL reads no header, so that limit is lifted meanwhile; a decoder's memory is bounded by ours.
    """
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=DECODED)
        _check_size(image.width, image.height, decoding)
    except PIL.Image.DecompressionBombError:
        with _lifting:
            limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
            try:
                image = PIL.Image.open(io.BytesIO(data), formats=DECODED)
                _check_size(image.width, image.height, decoding)
                image.load_prepare()  # in which the TIFF reader looks at the limit again
            finally:
                PIL.Image.MAX_IMAGE_PIXELS = limit
    return image


def _check_size(width: int, height: int, decoding: Decoding) -> None:
    if width * height > decoding.max_pixels:
        raise DecodeError(
            f"{width} x {height} = {width * height} pixels, more than images.max_pixels={decoding.max_pixels}; "
            f"take it with images.max_pixels={width * height}"
        )


def _picture(image: PIL.Image.Image, decoding: Decoding) -> Picture:
    raw = _raw_mode(image)
    turned_by_pil = image.format == "TIFF"  # when it loads the pixels
    orientation = _orientation(image) if turned_by_pil else UNTURNED
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
        return Picture(_turn(pixels, BACK.get(orientation, orientation)), tuple(conversions))
    turned = ["turned"] if orientation != UNTURNED else []
    return Picture(pixels, (*conversions, *turned))


def _raw_mode(image: PIL.Image.Image) -> str:
    """Return how the file stores a pixel, such as "RGB;16B"; "" if its format does not say so."""
    for tile in getattr(image, "tile", []):
        mode = tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3]
        return mode if isinstance(mode, str) else ""
    return ""


def _from_16_bits(image: PIL.Image.Image) -> np.ndarray:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DecodeError(
            f"whole numbers from {low} to {high}: one channel is taken as 16 bits, 0 to 65535; store it with 8 or 16"
        )
    tags = getattr(image, "tag_v2", {})
    largest = 4095 if tuple(tags.get(258) or ()) == (12,) else 65535  # TIFF's bits a sample
    values = values.astype(np.uint32)
    if tags.get(262) == 0:  # TIFF: white is zero, which PIL undoes for 8 bits only
        values = largest - values
    gray = (values * 510 + largest) // (2 * largest)  # the nearest, since no value lies between two
    return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)


def _from_float(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # nor NaN, which makes both NaN
        raise DecodeError(
            f"floats from {low:g} to {high:g}: taken are 0 to 1, as black to white; scale them, or store whole numbers"
        )
    gray = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def _on_white(image: PIL.Image.Image, pixels: np.ndarray, raw: str) -> np.ndarray | None:
    """Return the pixels laid on white; None if the image is opaque all over."""
    key: Any = image.info.get("transparency")
    if image.mode in ("1", "L", "RGB") or image.mode.startswith("I"):  # one colour of the file is transparent
        values = np.asarray(image)
        if image.mode == "1":
            values = values * np.uint8(255)  # as PIL has scaled the key
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
        value = image.getexif().get(ORIENTATION, UNTURNED)
    except Exception:  # of damaged EXIF
        return UNTURNED
    return value if isinstance(value, int) and value in range(1, 9) else UNTURNED


def _turned(pixels: np.ndarray, conversions: list[str], orientation: int, decoding: Decoding) -> Picture:
    if orientation == UNTURNED or decoding.orientation == "ignore":
        return Picture(pixels, tuple(conversions))
    return Picture(_turn(pixels, orientation), (*conversions, "turned"))


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return the pixels as an EXIF orientation of 1 to 8 says."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
