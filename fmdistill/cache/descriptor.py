"""Hold a file open for reading by offset, and close it with its last use."""

import os
from functools import lru_cache
from pathlib import Path

OPEN = 64  # tars that a process holds open; a system may allow it only a thousand files


class Descriptor:
    """An open file, closed with its last use. Forked processes may share it: `pread` moves no position."""

    def __init__(self, path: str | Path) -> None:
        self.number, self._close = -1, os.close  # for `__del__`, if the next line fails, or `os` is gone at the end
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            self._close(self.number)


@lru_cache(maxsize=OPEN)
def held_open(path: str, owner: object) -> Descriptor:
    """Return the file at `path` opened for `owner`, and hold the last `OPEN` of them open."""
    return Descriptor(path)
