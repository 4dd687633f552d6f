"""Read what a caller gives as an image: a path, a PIL image, or an array of pixels."""

# Legend: N images, H, W height and width.

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fmdistill.images.picture import DecodeError, decode
from fmdistill.registry import UserError

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
DEEP = ("I", "F")  # the first letter of PIL's modes of more than 8 bits a channel


def rgb(image: ImageLike) -> np.ndarray:
    """Return the pixels uint8 (H, W, 3) in RGB.

    A file is decoded as training images are: turned as its EXIF says, transparency laid on white. A PIL image is
    converted to RGB as it is, and an array must be uint8 (H, W, 3) in RGB. Raises UserError for anything else.
    """
    if isinstance(image, str | os.PathLike):
        return _decoded(Path(image).expanduser())
    if isinstance(image, Image.Image):
        if image.mode.startswith(DEEP):
            raise UserError(f"image: a PIL image of mode {image.mode} has more than 8 bits a channel; give its path")
        return np.array(image.convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise UserError(f"image: expected a path, a PIL image or a numpy array, got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(
            f"image: an array of {image.dtype} {image.shape}; expected uint8 (height, width, 3), RGB from 0 to 255"
        )
    return image


def each_rgb(images: ImageLike | Sequence[ImageLike]) -> list[np.ndarray]:
    """Return the pixels of one image or several, each as `rgb` does; an array may also be uint8 (N, H, W, 3)."""
    single = isinstance(images, str | os.PathLike | Image.Image) or (
        isinstance(images, np.ndarray) and images.ndim != 4
    )
    listed = [images] if single else images
    try:
        return [rgb(image) for image in listed]  # type: ignore[arg-type]
    except TypeError:  # not iterable
        raise UserError(f"images: expected an image or a list of images, got {type(images).__name__}") from None


def _decoded(path: Path) -> np.ndarray:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"image {path}: cannot be read ({error.strerror or error}); check the path") from None
    except DecodeError as error:
        raise UserError(f"image {path}: {error}") from None
