"""The seal of a tar: its last member holds the sha256 of all bytes before it, which the sidecar repeats.

Two writers whose bytes differ may leave the tar of one beside the sidecar of the other. Comparing the seals shows this
without hashing the tar.
"""

import os
import tarfile
from pathlib import Path

NAME = "__sha256__"  # webdataset skips members of such names
LENGTH = 64  # hexadecimal digits
SIZE = 2 * tarfile.BLOCKSIZE  # bytes in the tar: the member's header and its data
_PLACE = 3 * tarfile.BLOCKSIZE  # bytes before the tar's end, which is two empty blocks


def read(tar: Path) -> tuple[int, str]:
    """Return the bytes of the tar and its seal; of a file that is no sealed tar any text."""
    with open(tar, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return size, os.pread(file.fileno(), LENGTH, max(0, size - _PLACE)).decode("latin-1")
