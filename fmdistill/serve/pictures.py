"""Hold the images that a page shows, and what each network makes of them, computed once."""

# Legend: H, W pixels of the picture that the page shows, S the square's side.

import hashlib
import io
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import PIL.Image
import torch
from torch import Tensor

from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate.results import TEACHER
from fmdistill.images import DecodeError
from fmdistill.images.picture import read as read_picture
from fmdistill.registry import UserError
from fmdistill.serve.subjects import OpenedRuns, synchronize

LONG_SIDE = 1024  # pixels of the picture that the page shows, and in which masks are compared
HELD = 16  # images in memory at once, the least recently used is dropped
QUALITY = 92  # of the JPEG that the page shows

Size = tuple[int, int]
Place = tuple[int, int]  # shard and index of a cache's validation image


@dataclass(frozen=True)
class ImageEmbedding:
    """A network's embedding of one image, on the networks' device, and the milliseconds that it took, if any."""

    embedding: Tensor
    milliseconds: float | None  # None if it was read from the cache


@dataclass
class OpenImage:
    """An image in memory: the JPEG to show, and the prepared pixels (1, 3, S, S) with their sizes (1, 2)."""

    key: str
    name: str
    jpeg: bytes
    shown: Size  # (H, W)
    original: Size
    pixels: Tensor
    sizes: Tensor
    place: Place | None
    embeddings: dict[str, ImageEmbedding] = field(default_factory=dict)


class UnknownImage(LookupError):
    """An image is not in memory: it was never opened, or dropped for later ones."""


class Pictures:
    """The images in memory by key, at most `held`; embeddings are computed one at a time, and once."""

    def __init__(self, opened: OpenedRuns, held: int = HELD) -> None:
        self.opened, self.held = opened, held
        self._images: OrderedDict[str, OpenImage] = OrderedDict()
        self._changing, self._computing = threading.Lock(), threading.Lock()
        self._cached = None if opened.cache is None else CachedImages(opened.cache, "validation")

    def open(self, data: bytes, name: str, place: Place | None = None) -> OpenImage:
        """Decode an image, unless its bytes are in memory. Raises UserError if that is not possible."""
        key = hashlib.blake2b(data, digest_size=12, key=repr(place).encode()).hexdigest()
        try:
            return self.get(key)
        except UnknownImage:
            image = self._decode(key, data, name, place)
        with self._changing:
            self._images[key] = image
            while len(self._images) > self.held:
                self._images.popitem(last=False)
        return image

    def get(self, key: str) -> OpenImage:
        """Return an image in memory. Raises UnknownImage."""
        with self._changing:
            if key not in self._images:
                raise UnknownImage(key)
            self._images.move_to_end(key)
            return self._images[key]

    def embedding(self, image: OpenImage, subject: str) -> ImageEmbedding:
        """Return a network's embedding of the image. Raises UserError for a teacher that is not at hand."""
        if (made := image.embeddings.get(subject)) is not None:
            return made
        with self._computing:
            if subject not in image.embeddings:
                image.embeddings[subject] = self._embed(image, subject)
            return image.embeddings[subject]

    def _decode(self, key: str, data: bytes, name: str, place: Place | None) -> OpenImage:
        try:
            pixels_HW3 = read_picture(data, self.opened.decoding).pixels
        except DecodeError as error:
            reason = str(error).partition("; allow it with")[0]
            raise UserError(f"{name}: cannot be decoded: {reason}; open a JPEG, PNG, WebP or TIFF image") from None
        height, width = pixels_HW3.shape[:2]
        pixels, size = self.opened.preprocess.prepare(pixels_HW3)
        scale = LONG_SIDE / max(height, width)
        shown = max(1, round(height * scale)), max(1, round(width * scale))
        picture = PIL.Image.fromarray(pixels_HW3).resize((shown[1], shown[0]), PIL.Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=QUALITY)
        return OpenImage(key, name, file.getvalue(), shown, (height, width), pixels[None], torch.tensor([size]), place)

    def _embed(self, image: OpenImage, name: str) -> ImageEmbedding:
        subject, device = self.opened.subjects[name], self.opened.device
        if name == TEACHER and image.place is not None and self._cached is not None:
            stored = self._cached.outputs([image.place])["embedding"][0]  # of validation images, exact
            return ImageEmbedding(stored.to(device), None)
        if subject.embed is None:
            raise UserError(f"the teacher is not at hand for this image: {subject.problem}")
        start = time.perf_counter()
        embedding = subject.embed(image.pixels, image.sizes).to(device)
        synchronize(device)
        return ImageEmbedding(embedding, 1000 * (time.perf_counter() - start))
