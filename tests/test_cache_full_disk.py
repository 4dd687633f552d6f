"""A disk that fills at any write, flush, link or rename: one clear line, nothing half-written, and the rest later."""

import builtins
import errno
import os
from pathlib import Path

import pytest
import tiny

from fmdistill import files
from fmdistill.cache import writer
from fmdistill.cli import main

SIZE = ["images.train=5", "images.validation=2", "images.shard_size=3"]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "recipe.yaml"}


class Disk:
    """Counts the calls of one kind, and is full at call number `full`."""

    def __init__(self, monkeypatch, kind: str, full: int | None = None) -> None:
        self.calls, self.full = 0, full
        self.kind = "link" if kind == "replace" else kind
        if kind in ("open", "write"):
            for module in (files, writer):
                monkeypatch.setattr(module, "open", self.open if kind == "open" else self.opened, raising=False)
        else:
            monkeypatch.setattr(os, kind, self.counted(getattr(os, kind)))

    def counted(self, function):
        def call(*arguments):
            self.calls += 1
            if self.calls - 1 == self.full:
                # as Python's own: that of a write or flush names no file
                paths = {"open": arguments[:1], "link": [arguments[0], None, arguments[-1]]}
                raise OSError(errno.ENOSPC, "No space left on device", *paths.get(self.kind, []))
            return function(*arguments)

        return call

    def open(self, *arguments):
        return self.counted(builtins.open)(*arguments)

    def opened(self, path, mode):
        file = builtins.open(path, mode)
        return File(file, self) if "x" in mode else file


class File:
    """An open file whose `write` a Disk counts; half of what does not fit is written."""

    def __init__(self, file, disk: Disk) -> None:
        self.file = file
        self.write = disk.counted(file.write)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("kind", ["open", "write", "fsync", "link", "replace"])
def test_a_full_disk_stops_with_one_line_and_the_same_command_completes_the_cache(tmp_path, capsys, kind):
    recipe = str(tiny.write(tmp_path))

    def run(root: Path, full: int | None = None) -> tuple[int, Disk, list[str]]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            disk = Disk(monkeypatch, kind, full)
            code = main(["cache", recipe, f"cache.root={root}", *SIZE])
        return code, disk, [line for line in capsys.readouterr().err.splitlines() if line.startswith("fmdistill:")]

    code, undisturbed, _ = run(tmp_path / "whole")
    assert code == 0 and undisturbed.calls >= 3
    expected = contents(tmp_path / "whole")
    for full in range(0, undisturbed.calls, 1 + undisturbed.calls // 12):
        root = tmp_path / str(full)
        code, _, lines = run(root, full)
        assert code == 2 and len(lines) == 1, (full, lines)
        assert "No space left on device" in lines[0] and str(root) in lines[0], lines
        assert lines[0].endswith("; free some space, then the same command continues where it stopped")
        assert not list(root.glob(".*"))
        assert contents(root).items() <= expected.items()
        assert run(root)[0] == 0 and contents(root) == expected


def test_a_tar_that_was_deleted_takes_its_sidecar_with_it(tmp_path, capsys):
    from fmdistill import cache

    recipe = tiny.load(tmp_path, *SIZE)
    cache.run(recipe)
    expected = contents(tmp_path / "cache")
    sidecar = tmp_path / "cache/train-000.json"
    changed = sidecar.read_text().replace('"crc32": ', '"crc32": 1')  # of other values, of as many bytes
    sidecar.write_text(changed)
    sidecar.with_suffix(".tar").unlink()
    cache.run(recipe)
    assert changed.encode() != expected["train-000.json"] and contents(tmp_path / "cache") == expected
