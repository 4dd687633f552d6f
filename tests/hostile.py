"""Build inputs with random damage, and hostile inputs with matching checksums."""

import copy
import io
import json
import random
import struct
import tarfile
import zlib
from typing import Any

import PIL.Image

NAMES = [
    "../out.jpg",
    "/tmp/out.jpg",
    "a/../../out.jpg",
    "\0.jpg",
    "a" * 5000 + ".jpg",
    "..",
    "",
    "\udcff.jpg",
    "a\n.jpg",
]
NUMBERS = [-1, 0, 1, 2**31, 2**63, 10**30, -(10**30), 1e308, float("nan"), float("inf"), True]
VALUES = [*NUMBERS, None, "", "../../out", "a" * 100_000, [], {}, [[]], {"a": {}}]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return `data` truncated, with bits flipped, a piece repeated or removed, or some bytes set to extreme values."""
    damage, place = rng.randrange(5), rng.randrange(len(data))
    if damage == 0:
        return data[:place]
    if damage == 1:
        out = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        return bytes(out)
    length = rng.randrange(1, 600)
    if damage == 2:
        return data[:place] + data[place : place + length] * 2 + data[place + length :]
    if damage == 3:
        return data[:place] + data[place + length :]
    field = rng.choice([b"\xff", b"\0", b"7"]) * rng.choice([1, 2, 4, 8, 12])
    return data[:place] + field + data[place + len(field) :]


def hostile_tar(rng: random.Random) -> bytes:
    """Return a tar with correct header checksums, but hostile names, types, sizes and extended headers."""
    out = io.BytesIO()
    for _ in range(rng.randrange(1, 5)):
        info = tarfile.TarInfo(rng.choice([*NAMES[:3], "a.jpg", "b.png", "b.cls", "c.json"]))
        info.type = rng.choice(
            [*[tarfile.REGTYPE] * 4, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
        )
        info.linkname = rng.choice(["", "/etc/passwd", "../.."])
        body = rng.choice([b"", small_image("JPEG"), rng.randbytes(700), b"9" * 5000])
        info.size = len(body)
        if rng.random() < 0.3:
            info.pax_headers = {
                rng.choice(["size", "path", "GNU.sparse.map", "GNU.sparse.size", "mtime", "x"]): str(
                    rng.choice(NUMBERS)
                )
            }
        try:
            header = bytearray(info.tobuf(rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
        except (ValueError, OverflowError):
            continue
        if rng.random() < 0.4:
            header[-512 + 124 : -512 + 136] = rng.choice(
                [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0", b"\x80" + b"\0" * 10 + b"\7"]
            )
        if rng.random() < 0.2:
            header[-512 + 156] = rng.choice(b"LKSxgX7")
        total = 256 + sum(header[-512:-364]) + sum(header[-356:])
        header[-364:-356] = b"%06o\0 " % total
        out.write(header + body + b"\0" * (-len(body) % 512))
    out.write(b"\0" * rng.choice([0, 512, 1024]))
    return out.getvalue()


def small_image(format: str, size: tuple[int, int] = (48, 32), mode: str = "RGB") -> bytes:
    """Return an encoded image of noise."""
    buffer = io.BytesIO()
    PIL.Image.effect_noise(size, 60).convert(mode).save(buffer, format)
    return buffer.getvalue()


def hostile_png(rng: random.Random) -> bytes:
    """Return a PNG with hostile sizes, depths and chunks, but correct chunk checksums."""
    data = small_image("PNG", mode=rng.choice(["RGB", "L", "RGBA", "P", "1"]))
    chunks, place = [], 8
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += size + 12
    kind, header = chunks[0]
    side = [0, 1, 30_000, 65_535, 2**31 - 1, 2**32 - 1, 48]
    header = (
        struct.pack(">II", rng.choice(side), rng.choice(side))
        + bytes([rng.choice([1, 2, 8, 16, 9]), rng.randrange(8)])
        + header[10:]
    )
    chunks[0] = (kind, header)
    if rng.random() < 0.3:
        text = zlib.compress(b"\0" * rng.choice([10, 100_000_000])) if rng.random() < 0.3 else rng.randbytes(100)
        chunks.insert(1, (rng.choice([b"zTXt", b"iCCP", b"eXIf", b"tEXt", b"acTL", b"fcTL"]), b"a\0\0" + text))
    if rng.random() < 0.3:
        chunks.insert(rng.randrange(1, len(chunks)), rng.choice(chunks))
    packed = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return data[:8] + packed


def hostile_jpeg(rng: random.Random) -> bytes:
    """Return a JPEG with a hostile size or channel count in its frame header, or EXIF data with hostile offsets."""
    data = bytearray(small_image("JPEG", mode=rng.choice(["RGB", "L", "CMYK"])))
    frame = data.find(b"\xff\xc0")
    fault = rng.randrange(3)
    if fault == 0:
        data[frame + 5 : frame + 9] = struct.pack(">HH", *rng.choices([0, 1, 65_500, 65_535, 13_000], k=2))
    elif fault == 1:
        data[frame + 9] = rng.choice([0, 1, 2, 4, 255])
    else:
        exif = b"Exif\0\0MM\0*" + struct.pack(">I", rng.choice([8, 0, 2**32 - 1])) + rng.randbytes(60)
        data[2:2] = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    return bytes(data)


def hostile_json(text: bytes, rng: random.Random) -> bytes:
    """Return the JSON with one to three values replaced or removed, or JSON nested deeper than the parser's stack."""
    if rng.random() < 0.02:
        return b"[" * 200_000
    value = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 3])):
        node: Any = value
        while True:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            if rng.random() < 0.25:
                del node[key]
            elif isinstance(node[key], int) and rng.random() < 0.5:
                node[key] += rng.choice([-512, -1, 1, 512, 10**9])
            else:
                node[key] = copy.deepcopy(rng.choice(VALUES))
            break
        if not value:
            break
    return json.dumps(value).encode()
