"""The tar of a shard while it is written, by webdataset's TarWriter: the offset of each member, the hash of all."""

import hashlib
import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.writer import TarWriter

from fmdistill.cache import seal
from fmdistill.files import naming

BLOCK = tarfile.BLOCKSIZE


class ShardTar:
    """A tar that is being written into `file`; errors name `path`.

    Its bytes depend on the members' names and data alone: neither on a clock nor on the user.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._sink = _Sink(path, file)
        self._writer = _Unbuffered(
            self._sink,  # type: ignore[arg-type]
            user="",
            group="",
            mode=0o644,
            mtime=0,
            encoder=False,
            keep_meta=True,  # an output whose name begins with "_"
            format="PAX_FORMAT",  # which webdataset 1.0 uses whatever is given
        )
        self._writer.tarstream.copybufsize = 1 << 30  # type: ignore[attr-defined]  # a member at once, uncopied

    @property
    def sha256(self) -> str:
        """The hash of all bytes so far, in hex."""
        return self._sink.digest.hexdigest()

    def add(self, key: str, suffix: str, data: bytes) -> int:
        """Append the member "key.suffix"; return the offset of its data."""
        self._writer.write({"__key__": key, suffix: data})
        return self._sink.size - -(-len(data) // BLOCK) * BLOCK

    def end(self) -> str:
        """Append the seal and the tar's end; return the seal."""
        sealed, member = self.sha256, tarfile.TarInfo(seal.NAME)
        member.size = len(sealed)
        self._writer.tarstream.addfile(member, io.BytesIO(sealed.encode()))  # TarWriter would give it a suffix
        self._sink.write(b"\0" * (2 * BLOCK))  # `close` would write up to 20 blocks, so that no reader finds the seal
        return sealed


class _Unbuffered(TarWriter):
    """webdataset's writer without its buffer of 10 kB: what was added is written, so its offset and hash are known."""

    @staticmethod
    def tarmode(fileobj: Any, compress: Any = None) -> str:
        """Return the mode in which tarfile writes."""
        return "w"


@dataclass
class _Sink:
    """The file of a tar. Hashes what is written, since reading gigabytes again would keep the teacher waiting."""

    path: Path  # as errors name it
    file: BinaryIO
    digest: Any = field(default_factory=hashlib.sha256)
    size: int = 0

    def write(self, data: bytes) -> int:
        """Write all of `data`."""
        with naming(self.path):
            self.file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        """Return the bytes so far."""
        return self.size
