"""Tests of executors: all write the same cache, even if a Ray actor is killed in the middle."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch

from fmdistill import cache, pipeline, recipe
from fmdistill.cache import manifest, teacher_pass
from fmdistill.images import build
from fmdistill.registry import UserError

SIZE = ("images.train=48", "images.validation=16", "images.shard_size=8")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "recipe.yaml"}


class SlowTeacher(tiny.SamTeacher):
    """The toy teacher; if FMDISTILL_SLOW names a folder, it writes its process id there and is slow.

    After a worker was killed, the others wait until its successor works, so that work is left for that.
    """

    def __call__(self, pixels, sizes):
        if slow := os.environ.get("FMDISTILL_SLOW"):
            folder, deadline = Path(slow), time.monotonic() + 600
            (folder / f"{os.getpid()}.working").touch()
            time.sleep(0.2)
            while (folder / "killed").exists() and len(list(folder.glob("*.working"))) < 3:
                assert time.monotonic() < deadline, "no actor took the killed one's place"
                time.sleep(0.05)
        return super().__call__(pixels, sizes)


def teacher() -> SlowTeacher:
    sam = tiny.tiny_sam(0, 64, tiny.CHANNELS)
    return SlowTeacher(sam, name="tiny", device="cpu", dtype="fp32", batch=2, workers=0)


def load(folder: Path, *overrides: str) -> recipe.Recipe:
    folder.mkdir(exist_ok=True)
    return tiny.load(folder, "teacher.name=test_cache_executors:teacher", *SIZE, *overrides)


def test_the_executor_is_one_override_and_not_in_the_caches_identity(tmp_path):
    default, ray = load(tmp_path), load(tmp_path, "cache.executor.name=ray", "cache.executor.actors=3")
    assert default.cache.executor == {"name": "local"} and ray.cache.executor == {"name": "ray", "actors": "3"}
    assert default.cache == ray.cache
    pipeline.check(ray)
    assert "executor" not in str(cache.identity(ray, build(ray.images), teacher()))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["cache.executor.name=rey"], "cache.executor.name: unknown name 'rey'. Did you mean 'ray'"),
        (["cache.executor.name=local", "cache.executor.actors=2"], "cache.executor.actors: no such setting"),
        (["cache.executor.name=ray", "cache.executor.actors=many"], "cache.executor.actors='many'"),
        (["cache.executor.name=ray", "cache.executor.actors=0"], "actors=0"),
        (["cache.executor.name=ray", "cache.executor.num_cpus=0"], "num_cpus=0"),
        (
            ["cache.executor.name=ray", "cache.executor.address=foo"],
            "address=foo: no Ray cluster at this address",
        ),
        (["cache.executor.name=accelerate"], "no launcher started this process; start it as `accelerate launch -m"),
    ],
)
def test_wrong_settings_raise_before_a_teacher_is_loaded(tmp_path, monkeypatch, overrides, message):
    for name in ("RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    if "address=foo" in str(overrides):
        pytest.importorskip("ray")
    settings = load(tmp_path, *overrides)
    with pytest.raises(UserError) as caught:
        pipeline.check(settings)
        cache.run(settings)
    assert message in str(caught.value) and not (tmp_path / "cache").exists()


def test_a_missing_ray_raises(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed; pip install 'fmdistill\[ray\]'"):
        cache.run(load(tmp_path, "cache.executor.name=ray"))


def test_ray_inside_a_launcher_raises(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="each would start actors"):
        cache.run(load(tmp_path, "cache.executor.name=ray"))


@pytest.mark.parametrize(("rank", "world"), [("a", "4"), ("0", "many"), ("", "1"), ("0", "0")])
def test_a_launchers_variables_must_be_numbers(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match=f"RANK={rank}, WORLD_SIZE={world} in the environment: .*unset both"):
        teacher_pass.processes()


@pytest.mark.parametrize("name", ["local", "accelerate"])
def test_processes_of_a_launcher_write_their_own_shards_first(tmp_path, monkeypatch, name):
    written = []
    monkeypatch.setattr(teacher_pass.Pass, "write", lambda self, shard, bar: written.append(shard.name))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    settings = load(tmp_path, f"cache.executor.name={name}")
    cache.run(settings)
    shards = [shard.name for shard in build(settings.images).shards()]
    assert written[:2] == [shards[1], shards[5]] and sorted(written) == sorted(shards)


def test_a_shard_that_another_process_is_writing_comes_last(tmp_path, monkeypatch):
    from fmdistill.files import temporary_name

    settings, written = load(tmp_path), []
    other = temporary_name(tmp_path / "cache/train-000.tar")
    other = other.with_name(other.name.replace(f".{os.getpid()}.", f".{os.getppid()}."))
    write = teacher_pass.Pass.write
    monkeypatch.setattr(
        teacher_pass.Pass, "write", lambda self, shard, bar: written.append(shard.name) or write(self, shard, bar)
    )
    other.parent.mkdir()
    other.touch()
    cache.run(settings)
    assert written[-1] == "train-000" and len(written) == len(build(settings.images).shards()) and other.exists()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Start a Ray cluster of two CPUs; return the folder in which its slow teachers write their process ids."""
    ray = pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("cluster")
    paths = f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parent.parent}"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("FMDISTILL_SLOW", str(folder))
        environment.setenv("PYTHONPATH", paths)  # for the actors, which import the toy teacher
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False
        )
        environment.delenv("FMDISTILL_SLOW")
        yield folder
        ray.shutdown()


def ray_settings(folder: Path, *overrides: str) -> recipe.Recipe:
    return load(folder, "cache.executor.name=ray", *overrides)


@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_the_cache_equals_that_of_one_process(tmp_path, cluster, caplog):
    root, killed = tmp_path / "cache", []

    def kill():
        while not list(root.glob("train-*.json")):  # the second shard or so
            time.sleep(0.01)
        working = max(cluster.glob("*.working"), key=lambda p: p.stat().st_mtime)
        (cluster / "killed").touch()
        os.kill(int(working.stem), signal.SIGKILL)
        killed.append(int(working.stem))

    thread = threading.Thread(target=kill)
    thread.start()
    cache.run(ray_settings(tmp_path))
    thread.join()
    workers = {int(path.stem) for path in cluster.glob("*.working")}
    assert killed and len(workers) == 3 and os.getpid() not in workers
    assert "the actor died, another one takes over" in caplog.text
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as an actor of one CPU has
    cache.run(load(tmp_path / "whole"))
    torch.set_num_threads(threads)
    assert contents(root) == contents(tmp_path / "whole/cache")


@pytest.mark.slow
def test_an_error_in_an_actor_is_the_error_of_the_run(tmp_path, cluster):
    recipes = [ray_settings(tmp_path, "cache.executor.actors=1", *more) for more in ([], ["teacher.name=tiny:teacher"])]
    folder = tmp_path / "cache"
    folder.mkdir()
    rest = {"head": True, "outputs": {}, "images": {}}
    manifest.claim(folder, {"family": "other", "teacher": {"preprocess": {}}, **rest})
    with pytest.raises(UserError, match="this cache is another one: .* Choose another cache.root=FOLDER"):
        cache.run(recipes[0])
    (folder / manifest.NAME).unlink()
    (folder / "train-000.tar").mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError, match="train-000.tar"):
        cache.run(recipes[1])


@pytest.mark.slow
def test_a_local_cluster_starts_caches_and_ends_by_the_command_line(tmp_path):
    settings = ["images.train=8", "images.validation=4"]
    cache.run(tiny.load(tmp_path, *settings, f"cache.root={tmp_path}/whole"))
    executor = "cache.executor={name: ray, address: local, actors: 1, num_gpus: 0}"
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fmdistill", "cache", str(tiny.write(tmp_path)), *settings, executor]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
