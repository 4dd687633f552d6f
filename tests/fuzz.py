"""Feed thousands of damaged and hostile inputs to the readers: `python tests/fuzz.py 10000`.

An input is the bytes of an image tar, JPEG, PNG, shard, sidecar or manifest that were truncated, bit-flipped, spliced,
or rewritten with hostile values and matching checksums. Its reader must return values or raise an error that the
command line prints as one line, within SECONDS and MEMORY bytes; it must not open a file for writing outside the
sandbox, start a process or unpickle anything. A shard with a changed payload must be detected by the first read of the
changed member, or by `verify`.
"""

import argparse
import io
import os
import random
import resource
import signal
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
from hostile import damaged, hostile_jpeg, hostile_json, hostile_png, hostile_tar, small_image

from fmdistill import cache, images
from fmdistill.backbones.clip import ClipPreprocess
from fmdistill.backbones.sam import SamPreprocess
from fmdistill.cache.reader import Cache
from fmdistill.cache.store import Folder
from fmdistill.cache.verification import verify_files
from fmdistill.images import DecodeError, decode
from fmdistill.images.tar import Tar
from fmdistill.registry import UserError

SECONDS = 20
MEMORY = 3 << 30  # in addition to that in use before the inputs: the largest image PIL accepts takes half a gigabyte
EXPECTED = (UserError, OSError, DecodeError)  # errors that fmdistill.cli.main prints as one line
STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
    "socket.connect",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree")


class Watch:
    """Records forbidden events while it is on: starting processes, unpickling, writing outside `sandbox`."""

    def __init__(self) -> None:
        self.sandbox, self.on, self.seen = "", False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event in STARTS:
            self.seen.append(f"{event} {arguments}"[:200])
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike) and arguments[2] & WRITING:
            self._path(event, os.fsdecode(arguments[0]))
        elif event in CHANGES:
            self._path(event, os.fsdecode(arguments[0]))

    def _path(self, event: str, path: str) -> None:
        if not os.path.realpath(path).startswith(self.sandbox + os.sep):
            self.seen.append(f"{event} {path}"[:200])


@dataclass(frozen=True)
class Kind:
    """A kind of input: `make` returns a damaged input, `read` reads it and returns a description of any fault or ""."""

    make: Callable[[random.Random], bytes]
    read: Callable[[bytes], str]


def decoded(data: bytes) -> str:
    """Decode an image and prepare it for SAM and CLIP."""
    picture = decode(data)
    pixels, (h, w) = SamPreprocess(64, 16).prepare(picture)
    ClipPreprocess(64, 16).prepare(picture)
    return "" if pixels.shape == (3, 64, 64) and 1 <= h <= 64 and 1 <= w <= 64 else f"{pixels.shape} {h} {w}"


class Job:
    """A toy cache in a sandbox, whose files are replaced one at a time and restored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = tiny.load(folder)
        cache.run(self.recipe)
        self.root = folder / "cache"
        self.images = images.build(self.recipe.images)
        self.tar = next(self.root.glob("*train*.tar"))
        self.whole = {path.name: path.read_bytes() for path in self.root.iterdir()}
        self.values = self._values()

    def kinds(self) -> dict[str, Kind]:
        """Return all kinds of input by name."""
        tar, sidecar, manifest = self.tar.name, self.tar.with_suffix(".json").name, "manifest.json"
        pictures = {format: small_image(format) for format in ("JPEG", "PNG")}
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as file:
            for name, body in [
                ("a/1.jpg", pictures["JPEG"]),
                ("a/1.cls", b"3"),
                ("a/1.json", b"{}"),
                ("2.png", pictures["PNG"]),
            ]:
                info = tarfile.TarInfo(name)
                info.size = len(body)
                file.addfile(info, io.BytesIO(body))

        def either(plain: bytes, hostile: Callable[[random.Random], bytes]) -> Callable[[random.Random], bytes]:
            return lambda rng: damaged(plain, rng) if rng.random() < 0.5 else hostile(rng)

        def json_of(name: str) -> Callable[[random.Random], bytes]:
            return either(self.whole[name], lambda rng: hostile_json(self.whole[name], rng))

        return {
            "image tar": Kind(either(packed.getvalue(), hostile_tar), self.read_tar),
            "JPEG": Kind(either(pictures["JPEG"], hostile_jpeg), decoded),
            "PNG": Kind(either(pictures["PNG"], hostile_png), decoded),
            "shard": Kind(lambda rng: damaged(self.whole[tar], rng), lambda data: self.read_cache(tar, data)),
            "sidecar": Kind(json_of(sidecar), lambda data: self.read_cache(sidecar, data)),
            "manifest": Kind(json_of(manifest), lambda data: self.read_cache(manifest, data)),
        }

    def read_tar(self, data: bytes) -> str:
        """List the keys of an image tar and decode all its images."""
        (self.folder / "a.tar").write_bytes(data)
        source = Tar(str(self.folder), ["a.tar"])
        source.shards()
        for key in source.keys("a"):
            source.fetch("a", key)
        for encoded in source.read("a"):
            try:
                decoded(encoded.data)
            except DecodeError:
                pass
        return ""

    def read_cache(self, name: str, data: bytes) -> str:
        """Read a cache whose file `name` has the content `data`; return a fault if a value changed undetected."""
        (self.root / name).write_bytes(data)
        try:
            values = self._values()
            wrong = [key for key, value in values.items() if key not in self.values or value != self.values[key]]
            if wrong and name.endswith(".tar"):
                return f"{wrong[0]} was read with another value"
            verify_files(Cache(Folder(self.root), self.images))
            return "" if data == self.whole[name] or not name.endswith(".tar") else "verify found nothing"
        finally:
            (self.root / name).write_bytes(self.whole[name])

    def _values(self) -> dict[str, bytes]:
        opened = Cache(Folder(self.root), self.images)
        _ = opened.preprocess
        return {
            f"{reader.name}/{key}": reader.read(index)["embedding"].tobytes()
            for split in opened.shards.values()
            for reader in split
            for index, key in enumerate(reader.keys)
        }


def fuzz(folder: Path, inputs: int, seed: int = 0, only: str = "") -> tuple[Counter, list[str]]:
    """Feed `inputs` inputs of alternating kinds; return the counts of outcomes, and a line for each fault."""
    sandbox = folder / "sandbox"
    sandbox.mkdir()
    job, watch = Job(sandbox), Watch()
    watch.sandbox = os.path.realpath(sandbox)
    kinds = {name: kind for name, kind in job.kinds().items() if only in name}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.signal(signal.SIGPROF, _hangs)  # of processor time, so that a busy machine is not a hang
    signal.signal(signal.SIGALRM, _hangs)
    ends: Counter = Counter()
    wrong: list[str] = []
    try:
        for number in range(inputs):
            name = list(kinds)[number % len(kinds)]
            rng = random.Random(f"{seed} {number}")
            data = kinds[name].make(rng)
            watch.seen, watch.on = [], True
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(60 * SECONDS)
            try:
                with redirect_stderr(io.StringIO()):  # progress bars
                    problem, end = kinds[name].read(data), "values"
            except EXPECTED as error:
                problem, end = "" if str(error).strip() else "an empty error", type(error).__name__
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                problem, end = f"{type(error).__name__}: {str(error)[:200]}", "crash"
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
                watch.on = False
            ends[name, end] += 1
            wrong += [f"{name} {number}: {line}" for line in [problem, *watch.seen] if line]
            if sys.stderr.isatty() or number % 1000 == 999:
                print(f"\r{number + 1} inputs, {len(wrong)} wrong", end="", file=sys.stderr)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        watch.on = False
    left = {path.name for path in folder.iterdir()} - {"sandbox"}
    return ends, wrong + [f"written outside the sandbox: {name}" for name in left]


def _hangs(*_: Any) -> None:
    raise RuntimeError(f"still at work after {SECONDS} s of processor time, or {SECONDS} minutes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a kind of input, such as sidecar")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends, wrong = fuzz(Path(folder), arguments.inputs, arguments.seed, arguments.only)
    print()
    for (name, end), count in sorted(ends.items()):
        print(f"{name:10} {end:14} {count}")
    print("\n".join(wrong[:50]) or f"{sum(ends.values())} inputs, nothing wrong")
    sys.exit(bool(wrong))
