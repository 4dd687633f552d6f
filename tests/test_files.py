"""Whole or absent: what lies at a path is the old content or the new, never a part of either."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

from fmdistill.files import file_hash, sweep, temporary_name, write_first, write_whole


def test_content_replaces_content_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a"
    for content, expected in ((b"one", b"one"), ("zw\u00f6lf", "zw\u00f6lf".encode())):
        write_whole(path, content)
        assert path.read_bytes() == expected
    write_first(path, "late")
    write_first(tmp_path / "b", "early")
    assert path.read_text() == "zw\u00f6lf" and (tmp_path / "b").read_text() == "early"
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}
    assert file_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_leaves_the_old_content_and_no_temporary_file(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "a", "old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_sigkill_never_leaves_a_part(tmp_path):
    script = (
        "import itertools, sys\nfrom fmdistill.files import write_whole\n"
        "for n in itertools.count():\n    write_whole(sys.argv[1], bytes([n % 256]) * 1_000_000)"
    )
    path = tmp_path / "a"
    with subprocess.Popen([sys.executable, "-c", script, str(path)]) as process:
        while not path.exists():
            time.sleep(0.005)
        for _ in range(50):
            content = path.read_bytes()
            assert len(content) == 1_000_000 and len(set(content)) == 1
        process.send_signal(signal.SIGKILL)
    content = path.read_bytes()
    assert len(content) == 1_000_000 and len(set(content)) == 1
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_temporary_files_of_dead_processes_are_removed_and_a_live_one_s_are_not(tmp_path):
    alive = temporary_name(tmp_path / "train-000.tar")
    dead = alive.with_name(alive.name.replace(f".{os.getpid()}.", ".4194399."))
    foreign = tmp_path / ".train-000.tar.otherhost.4194399.00aa.tmp"
    for path in (alive, dead, foreign):
        path.write_bytes(b"x")
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {alive.name, foreign.name}
