"""Read text files and text columns as UTF-8, with an error that guesses any other encoding."""

import codecs
from pathlib import Path

from fmdistill.registry import UserError

MARKS = {  # byte order marks, longer marks first
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decode_text(data: bytes, where: str) -> str:
    """Decode UTF-8 `data` as text with \\n line ends and without a byte order mark.

    Raises UserError, with `where` and the likely encoding, if it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
        likely = f"{encoding} by its first bytes" if encoding else "Latin-1 or another 8-bit encoding"
        byte = data[error.start]
        raise UserError(
            f"{where}: not UTF-8 (byte {error.start} is 0x{byte:02x}), but {likely}; save it as UTF-8, such as with "
            f"`iconv -f {encoding or 'LATIN1'} -t UTF-8 OLD > NEW`"
        ) from None


def read_text(path: Path, where: str = "") -> str:
    """Read a text file like `decode_text`; `where` is the name of its setting in errors."""
    return decode_text(path.read_bytes(), f"{where}={path}" if where else str(path))
