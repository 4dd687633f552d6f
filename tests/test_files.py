"""Tests of atomic writes: a path has the old content or the new, never a part of either."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

from fmdistill.files import STALE, being_written, file_hash, sweep, temporary_name, write_first, write_whole


def test_content_is_replaced_and_no_other_file_remains(tmp_path):
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


def test_sigkill_never_leaves_a_partial_file(tmp_path):
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


def aged(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def renamed(alive, process=None, host=None):
    """Return the temporary name that another process or host would use instead of `alive`."""
    *first, own, number, rest, end = alive.name.split(".")
    return alive.with_name(".".join([*first, host or own, str(process or number), rest, end]))


def test_sweep_removes_temporary_files_of_dead_processes_only(tmp_path):
    alive, dead = temporary_name(tmp_path / "train-000.tar"), 4194399
    neighbour = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # not the parent
    paths = {
        "own": alive,
        "dead": renamed(alive, dead),
        "neighbour": renamed(alive, neighbour.pid),
        "foreign": renamed(alive, dead, "otherhost"),
        "stale_foreign": renamed(alive, dead - 1, "otherhost"),
        "reused": renamed(alive, 1),  # a live process, but it has not written for days
        "other_program": tmp_path / ".download.tmp",
    }
    for path in paths.values():
        path.write_bytes(b"x")
    aged(paths["foreign"], STALE - 60)
    for name in ("stale_foreign", "reused", "other_program"):
        aged(paths[name], STALE + 60)
    sweep(tmp_path)
    neighbour.communicate()
    assert {name for name, path in paths.items() if path.exists()} == {"own", "neighbour", "foreign", "other_program"}


def test_a_process_id_in_another_container_of_the_same_name_is_another_process(tmp_path, monkeypatch):
    from fmdistill import files

    other = renamed(temporary_name(tmp_path / "a"), 4194399)
    other.write_bytes(b"x")
    files._host.cache_clear()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(os, "readlink", lambda path: "pid:[1]")
        sweep(tmp_path)
    files._host.cache_clear()
    assert other.exists()
    sweep(tmp_path)
    assert not other.exists()


def test_a_file_is_being_written_if_another_live_process_has_a_temporary_file(tmp_path):
    path = tmp_path / "train-000.tar"
    own = temporary_name(path)
    own.write_bytes(b"x")
    renamed(own, 4194399).write_bytes(b"x")
    temporary_name(tmp_path / "train-001.tar").write_bytes(b"x")
    assert not being_written(path)
    other = renamed(own, os.getppid())
    other.write_bytes(b"x")
    assert being_written(path)
    aged(other, STALE + 60)
    assert not being_written(path)


def full_disk(path, other=None):
    raise OSError(errno.ENOSPC, "No space left on device", *([str(path), None, str(other)] if other else []))


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_the_error_of_a_full_disk_names_the_file(tmp_path, monkeypatch, step):
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(OSError, match=f"No space left on device.*{tmp_path}/a") as caught:
        write_first(tmp_path / "a", "new")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_writing_needs_no_hard_links(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EPERM, "Operation not permitted", *paths)

    monkeypatch.setattr(os, "link", refuse)
    write_first(tmp_path / "a", "one")
    write_first(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one" and len(list(tmp_path.iterdir())) == 1
