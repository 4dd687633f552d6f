"""The teacher pass: it never waits for the writing, and several processes share a folder. torchrun starts it too."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny

from fmdistill import cache
from fmdistill.cache.teacher_pass import BEHIND, Pass, own_shards_first
from fmdistill.cache.writer import ShardWriter
from fmdistill.images import Shard
from fmdistill.registry import UserError

TESTS = Path(__file__).parent
SHARDS, SIZE = 80, ("images.train=480", "images.validation=160")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "recipe.yaml"}


def counted(monkeypatch) -> list[int]:
    """Return the sizes of the batches that the teacher is given from now on."""
    batches, real = [], tiny.SamTeacher.__call__
    monkeypatch.setattr(tiny.SamTeacher, "__call__", lambda *a: (batches.append(len(a[1])), real(*a))[1])
    return batches


def test_the_teacher_works_on_while_outputs_are_written_but_not_far_ahead(tmp_path, monkeypatch):
    batches, add, ahead, threads = counted(monkeypatch), ShardWriter.add, [], set()
    overtaken = threading.Event()

    def slow(self, *rest):
        threads.add(threading.current_thread())
        if self.shard.name == "train-000" and not self.samples:
            deadline = time.monotonic() + 600
            while len(batches) <= BEHIND and time.monotonic() < deadline:  # the teacher goes on meanwhile
                time.sleep(0.001)
            if len(batches) > BEHIND:
                overtaken.set()
            time.sleep(0.3)  # would it go further, it would now
        ahead.append(len(batches) - (len(self.samples) // 2 + 1))
        return add(self, *rest)

    monkeypatch.setattr(ShardWriter, "add", slow)
    recipe = tiny.load(tmp_path, "teacher.batch=2", "images.shard_size=24", "images.validation=1")
    cache.run(recipe)
    assert overtaken.is_set() and threading.main_thread() not in threads
    assert 0 < ahead[0] == BEHIND
    assert sidecar_keys(tmp_path / "cache/train-000.json") == sorted(sidecar_keys(tmp_path / "cache/train-000.json"))


def test_what_decoding_converts_is_counted_in_one_line_and_its_orientation_is_part_of_the_cache(tmp_path, caplog):
    root = tmp_path / "images"
    root.mkdir()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for number in range(6):
        colours = np.random.default_rng(number).integers(0, 256, (40, 64, 3), dtype=np.uint8)
        PIL.Image.fromarray(colours).save(root / f"{number}.png")
        PIL.Image.fromarray(colours[..., 0].astype(np.uint16) * 257).save(root / f"{number}-deep.png")
    PIL.Image.fromarray(colours).save(root / "turned.jpg", exif=exif)
    settings = ["images.name=folder", f"images.root={root}", "images.validation=0.3"]
    caplog.set_level("INFO")
    cache.run(tiny.load(tmp_path, *settings))
    lines = [record.getMessage() for record in caplog.records if "scaled" in record.getMessage()]
    assert lines == ["of 13 images: 6 scaled from 16 bits a channel to 8, 1 turned as the EXIF orientation says"]
    stored = [s for path in (tmp_path / "cache").glob("*-*.json") for s in json.loads(path.read_text())["samples"]]
    assert {s["key"]: s["original"] for s in stored}["turned.jpg"] == [64, 40]

    other = tiny.load(tmp_path, *settings, "images.orientation=ignore")
    for use in (cache.run, lambda recipe: cache.open_cache(recipe).shards):
        with pytest.raises(
            UserError, match="images.decoding.orientation .*apply.*Go on with it by images.orientation=apply"
        ):
            use(other)
    cache.verify(tiny.load(tmp_path, *settings))


def test_plain_images_are_counted_nowhere(tmp_path, caplog):
    caplog.set_level("INFO")
    cache.run(tiny.load(tmp_path))
    assert not [record for record in caplog.records if record.getMessage().startswith("of ")]


def sidecar_keys(path: Path) -> list[int]:
    return [sample["index"] for sample in json.loads(path.read_text())["samples"]]


def test_an_error_of_the_writing_thread_stops_the_pass_with_that_error(tmp_path, monkeypatch):
    batches, add = counted(monkeypatch), ShardWriter.add

    def fail(self, *rest):
        if len(self.samples) == 3:
            raise OSError(28, "No space left on device")
        return add(self, *rest)

    monkeypatch.setattr(ShardWriter, "add", fail)
    with pytest.raises(OSError, match="No space left"):
        cache.run(tiny.load(tmp_path, "teacher.batch=1", "images.shard_size=24"))
    assert len(batches) <= 4 + BEHIND + 1
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix in (".tar", ".tmp")]
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]


def test_what_another_process_finishes_meanwhile_is_not_done_again(tmp_path, monkeypatch):
    recipe, write = tiny.load(tmp_path), Pass.write
    written = []

    def noted(self, shard, bar):
        written.append(shard.name)
        if len(written) == 1:
            cache.run(recipe)  # stands for another process, which finishes all
        return write(self, shard, bar)

    monkeypatch.setattr(Pass, "write", noted)
    cache.run(recipe)
    assert sorted(written) == ["train-000", "train-000", "train-001", "train-002", "validation-000"]
    assert cache.verify(recipe)["shards"] == 4


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_are_disjoint_and_every_process_helps_with_the_rest(world):
    shards = [Shard(f"train-{n:03}", "train") for n in range(21)]
    orders = [own_shards_first(shards, rank, world) for rank in range(world)]
    assert all(sorted(o, key=lambda s: s.name) == shards for o in orders)
    own = [shard for rank, order in enumerate(orders) for shard in order[: len(shards[rank::world])]]
    assert sorted(own, key=lambda s: s.name) == shards
    assert orders[0][:3] == shards[: 3 * world : world]
    if world == 8:  # processes that are done do not follow each other from shard to shard
        assert len({order[len(shards[rank::world]) + 1] for rank, order in enumerate(orders)}) > 4


@pytest.mark.slow
def test_two_processes_of_torchrun_share_the_work(tmp_path):
    (tmp_path / "whole").mkdir()
    cache.run(tiny.load(tmp_path / "whole", *SIZE))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", __file__, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole/cache")
    written = [json.loads((tmp_path / f"written-{rank}.json").read_text()) for rank in (0, 1)]
    assert len({*written[0], *written[1]}) == SHARDS
    assert len(written[0]) + len(written[1]) <= SHARDS + 8
    assert min(map(len, written)) >= SHARDS // 4


def main(folder: Path) -> None:
    """Cache in this process, one of two that begin together, and write down which shards it wrote."""
    rank = os.environ["RANK"]
    written: list[str] = []
    write, teach = Pass.write, tiny.SamTeacher.__call__

    def noted(self, shard, bar):
        written.append(shard.name)
        write(self, shard, bar)

    def slow(*arguments):
        time.sleep(0.02)  # so that a busy machine hardly makes one process faster than the other
        return teach(*arguments)

    Pass.write, tiny.SamTeacher.__call__ = noted, slow
    recipe = tiny.load(folder / rank, f"cache.root={folder}/cache", *SIZE)
    (folder / f"ready-{rank}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.01)
    cache.run(recipe)
    (folder / f"written-{rank}.json").write_text(json.dumps(written))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / os.environ["RANK"]).mkdir()
    main(folder)
