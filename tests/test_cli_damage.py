"""Tests of damaged files and full disks: one line or a counted skip, and no partial file remains."""

import errno
import io
import os
import pickle
import tarfile
from pathlib import Path

import PIL.Image
import pytest
import tiny
import torch
from test_cli import PROTOCOL, error_line, succeeded

from fmdistill.cache.store import Folder
from fmdistill.cache.writer import ShardWriter
from fmdistill.cli import main
from fmdistill.images import Shard


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.delenv("FMDISTILL_TRACEBACK", raising=False)


def test_a_corrupt_jpeg_is_counted_and_skipped_and_a_truncated_tar_is_one_line(tmp_path, capsys):
    source = tmp_path / "photos"
    source.mkdir()
    for i in range(12):
        PIL.Image.effect_noise((64, 48), 50 + i).convert("RGB").save(source / f"{i:02d}.jpg")
    whole = (source / "03.jpg").read_bytes()
    (source / "03.jpg").write_bytes(whole[:300])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(source.iterdir())[4:]:
            tar.add(path, path.name)
    cut = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(cut[: len(cut) // 2])
    recipe = tiny.write(tmp_path)
    folder = ["images.name=folder", f"images.root={source}", "images.validation=0.2", "cache.max_failed=0.1"]
    capsys.readouterr()
    assert main(["cache", str(recipe), *folder]) == 0
    log = capsys.readouterr().err
    assert "'03.jpg' skipped: cannot be decoded" in log
    assert "11 images cached, 1 skipped" in log
    assert "more than cache.max_failed" in error_line(
        capsys, "cache", recipe, *folder[:3], f"cache.root={tmp_path}/strict"
    )
    tar = ["images.name=tar", f"images.root={tmp_path}", "images.train=[cut.tar]", f"cache.root={tmp_path}/tar"]
    line = error_line(capsys, "cache", recipe, *tar)
    assert "cut.tar: truncated at byte" in line and "Download it again" in line
    assert not list((tmp_path / "tar").glob("*.tar"))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def bomb(path: Path, evidence: Path) -> None:
    """Write a checkpoint that creates the file `evidence` if it is unpickled."""
    torch.save({"image_encoder.pos_embed": Bomb(evidence)}, path)
    pickle.loads(pickle.dumps(Bomb(evidence))).close()
    assert evidence.exists()  # the bomb works
    evidence.unlink()


def test_a_pickle_bomb_as_checkpoint_is_not_executed(tmp_path, capsys):
    evidence, path = tmp_path / "went off", tmp_path / "bomb.pth"
    bomb(path, evidence)
    recipe, protocol = tiny.write(tmp_path), tmp_path / "grid.yaml"
    protocol.write_text(PROTOCOL)
    succeeded(capsys, "cache", recipe)
    line = error_line(capsys, "cache", recipe, "teacher.name=sam_vit_b", f"teacher.weights={path}")
    assert "not a readable checkpoint of plain tensors" in line and "nothing in it was executed" in line
    settings = ["student.name=tinyvit_sam_mini", f"student.pretrained={path}"]
    assert "not a readable checkpoint of plain tensors" in error_line(capsys, "distill", recipe, *settings)
    recipe.write_text(recipe.read_text().replace("tiny:Student", "tinyvit_sam_mini"))
    assert "not a readable checkpoint of plain tensors" in error_line(
        capsys, "evaluate", protocol, path, f"recipe={recipe}"
    )
    assert not evidence.exists()


def test_a_full_disk_is_one_line_and_the_same_command_completes_later(tmp_path, capsys, monkeypatch):
    recipe, add, write = tiny.write(tmp_path), ShardWriter.add, os.fsync

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def second(self, *rest):
        return full() if self.shard.name == "train-001" and self.samples else add(self, *rest)

    monkeypatch.setattr(ShardWriter, "add", second)
    assert "No space left on device; free some space" in error_line(capsys, "cache", recipe)
    assert [p.name for p in sorted((tmp_path / "cache").glob("*.tar"))] == ["train-000.tar"]
    assert not list((tmp_path / "cache").glob(".*.tmp"))
    monkeypatch.setattr(ShardWriter, "add", add)
    succeeded(capsys, "cache", recipe)
    monkeypatch.setattr("fmdistill.files.os.fsync", full)
    assert f"No space left on device: '{tmp_path}/run/recipe.yaml'; free some space" in error_line(
        capsys, "distill", recipe
    )
    monkeypatch.setattr("fmdistill.files.os.fsync", write)
    assert str(tmp_path / "run") in succeeded(capsys, "distill", recipe)
    assert not list((tmp_path / "run").rglob("*.part"))


def test_a_full_disk_leaves_no_temporary_file(tmp_path, monkeypatch):
    """Closing the file cannot flush the buffer either."""
    writer = ShardWriter(Folder(tmp_path), Shard("train-000", "train"), "x", {})
    writer.file.close()
    writer.file = io.BufferedWriter(Full())
    writer.file.write(b"x")
    writer.abandon()
    assert not list(tmp_path.iterdir())


class Full(io.RawIOBase):
    def writable(self):
        return True

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")
