"""What a loading process need not prepare again."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """The first `gigabytes` of what a process has made, by name.

    Nothing makes room for another: training reads in random order, so none is likelier to be asked for again.
    """

    def __init__(self, gigabytes: float, nbytes: Callable[[T], int]) -> None:
        self.free, self.nbytes = gigabytes * 1e9, nbytes
        self.held: dict[Hashable, T] = {}

    def get(self, name: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` gave for this name, or gives now."""
        if name in self.held:
            return self.held[name]
        made = make()
        size = self.nbytes(made)
        if size <= self.free:
            self.free -= size
            self.held[name] = made
        return made
