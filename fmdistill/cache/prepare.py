"""Prepare an image for a network, in the one way that the teacher pass, training and evaluation share."""

from typing import Any, NamedTuple

from torch import Tensor

from fmdistill.images import DecodeError, Encoded, Images, undecodable
from fmdistill.teachers.family import Preprocess


class PreparedImage(NamedTuple):
    """One image as a network takes it, with what its source says of it."""

    key: str
    shard: str
    label: int | None
    pixels: Tensor  # uint8 (3, S, S)
    size: tuple[int, int]  # (h, w) of the pixels that are real, not padding
    original: tuple[int, int]  # (H, W) of the decoded image
    conversions: tuple[str, ...] = ()  # what decoding did, as `Picture` names it
    extra: Any = None  # what a task prepares from the image's other columns, such as masks or captions

    @property
    def nbytes(self) -> int:
        """Return the bytes of the pixels and of `extra`, if that is an array."""
        return self.pixels.nbytes + getattr(self.extra, "nbytes", 0)


def prepare(images: Images, preprocess: Preprocess, encoded: Encoded, shard: str) -> PreparedImage:
    """Decode an image and prepare it for a network; DecodeError if it cannot be decoded."""
    picture = images.picture(encoded)
    height, width = picture.pixels.shape[:2]
    pixels, size = preprocess.prepare(picture.pixels)
    return PreparedImage(encoded.key, shard, encoded.label, pixels, size, (height, width), picture.conversions)


def must_prepare(images: Images, preprocess: Preprocess, encoded: Encoded, shard: str) -> PreparedImage:
    """Return what `prepare` does; UserError that names the image if it cannot be decoded."""
    try:
        return prepare(images, preprocess, encoded, shard)
    except DecodeError as error:
        raise undecodable(shard, encoded.key, error) from None
