"""Whole or absent: what lies at a path is the old content or the new, never a part of either."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

from fmdistill.files import STALE, being_written, file_hash, sweep, temporary_name, write_first, write_whole


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


def aged(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def named(alive, process=None, host=None):
    """The temporary name of another process or host, made from this process's."""
    *first, own, number, rest, end = alive.name.split(".")
    return alive.with_name(".".join([*first, host or own, str(process or number), rest, end]))


def test_temporary_files_of_the_dead_and_the_stale_are_removed_and_a_live_neighbour_s_are_not(tmp_path):
    alive, dead = temporary_name(tmp_path / "train-000.tar"), 4194399
    neighbour = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # not the parent
    paths = {
        "mine": alive,
        "dead": named(alive, dead),
        "neighbour": named(alive, neighbour.pid),
        "foreign": named(alive, dead, "otherhost"),
        "stale_foreign": named(alive, dead - 1, "otherhost"),
        "reused": named(alive, 1),  # a live process, but it has not written for days
        "not_ours": tmp_path / ".download.tmp",
    }
    for path in paths.values():
        path.write_bytes(b"x")
    aged(paths["foreign"], STALE - 60)
    for name in ("stale_foreign", "reused", "not_ours"):
        aged(paths[name], STALE + 60)
    sweep(tmp_path)
    neighbour.communicate()
    assert {name for name, path in paths.items() if path.exists()} == {"mine", "neighbour", "foreign", "not_ours"}


def test_the_same_number_in_another_container_of_the_same_name_is_another_process(tmp_path, monkeypatch):
    from fmdistill import files

    theirs = named(temporary_name(tmp_path / "a"), 4194399)
    theirs.write_bytes(b"x")
    files._host.cache_clear()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(os, "readlink", lambda path: "pid:[1]")
        sweep(tmp_path)
    files._host.cache_clear()
    assert theirs.exists()
    sweep(tmp_path)
    assert not theirs.exists()


def test_a_file_is_being_written_while_another_live_process_has_a_temporary_one(tmp_path):
    path = tmp_path / "train-000.tar"
    mine = temporary_name(path)
    mine.write_bytes(b"x")
    named(mine, 4194399).write_bytes(b"x")
    temporary_name(tmp_path / "train-001.tar").write_bytes(b"x")
    assert not being_written(path)
    theirs = named(mine, os.getppid())
    theirs.write_bytes(b"x")
    assert being_written(path)
    aged(theirs, STALE + 60)
    assert not being_written(path)


def full_disk(path, other=None):
    raise OSError(errno.ENOSPC, "No space left on device", *([str(path), None, str(other)] if other else []))


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch, step):
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(OSError, match=f"No space left on device.*{tmp_path}/a") as caught:
        write_first(tmp_path / "a", "new")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_file_system_without_hard_links_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EPERM, "Operation not permitted", *paths)

    monkeypatch.setattr(os, "link", refuse)
    write_first(tmp_path / "a", "one")
    write_first(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one" and len(list(tmp_path.iterdir())) == 1
