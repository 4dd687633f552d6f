"""Keep prepared images in a process's memory, so that later epochs need not prepare them again."""

from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class HasBytes(Protocol):
    """A value that knows its size, as tensors and arrays do."""

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        ...


T = TypeVar("T", bound=HasBytes)


class ImageMemory(Generic[T]):
    """Holds the first `gigabytes` of images that a process prepares, by name.

    Nothing is evicted: training reads in random order, so no image is likelier to be needed again than another.
    """

    def __init__(self, gigabytes: float) -> None:
        self.free = gigabytes * 1e9  # bytes
        self.images: dict[Hashable, T] = {}

    def get(self, name: Hashable, prepare: Callable[[], T]) -> T:
        """Return the image called `name`, calling `prepare` unless it is in memory."""
        if name in self.images:
            return self.images[name]
        image = prepare()
        if image.nbytes <= self.free:
            self.free -= image.nbytes
            self.images[name] = image
        return image
