"""A finished cache is known to be its teacher's without opening the teacher's file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from fmdistill import cache, teachers
from fmdistill.cache import unchanged
from fmdistill.mini import clip, sam
from fmdistill.registry import UserError


def load(folder: Path, *overrides: str):
    return tiny.load(folder, "teacher.name=sam_mini", f"teacher.weights={folder}/mini.safetensors", *overrides)


@pytest.fixture
def made(tmp_path):
    (tmp_path / "mini.safetensors").write_bytes(sam.PACKAGED.read_bytes())
    cache.run(load(tmp_path, "images.train=4", "images.validation=2"))
    return tmp_path


def again(folder: Path, *overrides: str):
    return cache.run(load(folder, "images.train=4", "images.validation=2", *overrides))


def test_a_finished_cache_opens_no_weights_and_builds_no_teacher(made, monkeypatch):
    path = made / "mini.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(b"\0" * path.stat().st_size)  # what nobody reads may hold anything
    os.utime(path, ns=times)
    monkeypatch.setattr(teachers, "build", lambda settings: pytest.fail("the teacher is built"))
    before = {p.name: p.stat().st_mtime_ns for p in (made / "cache").iterdir()}
    assert again(made)["teacher"]["name"] == "sam_mini"
    assert again(made, "teacher.batch=3", "teacher.workers=5", "teacher.device=cpu")
    assert {p.name: p.stat().st_mtime_ns for p in (made / "cache").iterdir()} == before


def test_a_file_that_changed_since_is_opened(made):
    path = made / "mini.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match="mini.safetensors"):
        again(made)


@pytest.mark.parametrize("override", ["teacher.weights=none", "teacher.exact=true"])
def test_another_teacher_is_refused_as_before(made, override):
    with pytest.raises(UserError, match="this cache is another one"):
        again(made, override)


def test_a_missing_shard_loads_the_teacher_and_is_written(made):
    shard = made / "cache/train-000.tar"
    data = shard.read_bytes()
    shard.unlink()
    again(made)
    assert shard.read_bytes() == data


def test_a_cache_that_was_copied_asks_the_teacher_once_more(made, monkeypatch):
    (made / "cache" / unchanged.NAME).unlink()
    built = []
    build = teachers.build
    monkeypatch.setattr(teachers, "build", lambda settings: built.append(1) or build(settings))
    again(made)
    again(made)
    assert built == [1]


def test_a_teacher_of_another_package_is_always_asked(tmp_path):
    tmp_path.joinpath("cache").mkdir()
    unchanged.note({"name": "tiny:teacher"}, tmp_path / "cache")
    assert not unchanged.is_noted({"name": "tiny:teacher"}, tmp_path / "cache")


def test_a_finished_cache_is_told_without_torch(made):
    script = (
        "import sys\nfrom fmdistill.cli import main\nassert main(sys.argv[1:]) == 0\nassert 'torch' not in sys.modules"
    )
    settings = ["teacher.name=sam_mini", f"teacher.weights={made}/mini.safetensors"]
    argv = ["cache", str(tiny.write(made)), *settings, "images.train=4", "images.validation=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", script, *argv], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all 2 shards are cached" in done.stderr


def test_a_damaged_head_is_no_finished_cache(made):
    head = made / "cache/head.safetensors"
    data = head.read_bytes()
    head.write_bytes(data[:1000])
    again(made)
    assert head.read_bytes() == data


def test_the_packaged_weights_lie_where_their_teachers_read_them():
    assert {path.parent for path in (sam.PACKAGED, clip.PACKAGED)} == {unchanged.PACKAGED}
    assert all((unchanged.PACKAGED / f"{name}.safetensors").is_file() for name in ("sam_mini", "clip_mini"))
