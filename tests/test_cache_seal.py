"""A tar and another writer's sidecar are told apart; a shard of failures is finished like any other."""

import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import webdataset

from fmdistill import cache, distill
from fmdistill.cache import seal, sidecar, writer
from fmdistill.cache.codec import named
from fmdistill.cache.outputs import StoredOutput
from fmdistill.cache.reader import ShardReader
from fmdistill.cache.store import Folder
from fmdistill.cache.writer import ShardWriter, TeacherInput
from fmdistill.files import file_hash
from fmdistill.images import Encoded, Shard, build
from fmdistill.images.source import SPLITS
from fmdistill.mini import photos
from fmdistill.registry import UserError

SHARD = Shard("train-000", "train")
FP32 = {split: named("fp32") for split in SPLITS}
OUTPUTS = {"x": StoredOutput((3,), codecs=FP32), "map": StoredOutput((1, 2, 2), "image", codecs=FP32)}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def written(root: Path, value: float) -> ShardWriter:
    """Return a writer that has everything but to publish: one image, whose vector and map hold `value`."""
    made = ShardWriter(Folder(root), SHARD, "identity", OUTPUTS)
    outputs = {"x": np.full(3, value, np.float32), "map": np.full((1, 2, 2), value, np.float32)}
    made.add(TeacherInput(0, "a.png", "hash", original=(2, 2), resized=(2, 2)), outputs, np.ones((2, 2), bool))
    return made


def finished(root: Path) -> sidecar.Finished | None:
    return sidecar.finished(Folder(root), SHARD, "identity", OUTPUTS)


def test_the_seal_is_the_hash_of_all_before_it_and_webdataset_does_not_see_it(tmp_path):
    written(tmp_path, 1.0).publish()
    path = tmp_path / "train-000.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
        told = tar.extractfile(last).read().decode()  # type: ignore[union-attr]
    (tmp_path / "before").write_bytes(path.read_bytes()[: last.offset])
    assert last.name == "__sha256__" and told == file_hash(tmp_path / "before")
    assert seal.read(path) == (path.stat().st_size, told)
    fields = sidecar.read(tmp_path / "train-000.json")
    assert fields is not None and fields["seal"] == told and fields["sha256"] == file_hash(path)
    samples = list(webdataset.WebDataset([str(path)], shardshuffle=False).decode())
    assert [{name for name in sample if not name.startswith("__")} for sample in samples] == [{"map.npy"}, {"npy"}]


def test_a_writer_that_dies_between_tar_and_sidecar_leaves_no_pair_that_seems_finished(tmp_path, monkeypatch):
    first, second = written(tmp_path, 1.0), written(tmp_path, 2.0)
    publish, replace = writer.publish, os.replace

    def killed(source, target):
        if str(target).endswith(".json"):
            raise KeyboardInterrupt
        replace(source, target)

    def interleaved(temporary, path):  # the second comes between the first's tar and its sidecar
        if path.suffix == ".json" and not second.file.closed:
            monkeypatch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                second.publish()
            monkeypatch.setattr(os, "replace", replace)
        return publish(temporary, path)

    monkeypatch.setattr(writer, "publish", interleaved)
    first.publish()
    monkeypatch.undo()
    tar, fields = tmp_path / "train-000.tar", sidecar.read(tmp_path / "train-000.json")
    assert fields is not None and fields["bytes"] == tar.stat().st_size and fields["sha256"] != file_hash(tar)
    assert finished(tmp_path) is None
    written(tmp_path, 3.0).publish()
    healed = finished(tmp_path)
    assert healed is not None and healed.fields["sha256"] == file_hash(tar)
    reader = ShardReader(Folder(tmp_path), SHARD, healed, "", OUTPUTS)
    assert reader.read(0)["x"].tolist() == [3.0] * 3


def test_verify_finds_a_tar_beside_another_s_sidecar_and_the_next_run_heals_it(tmp_path, monkeypatch):
    settings = tiny.load(tmp_path)
    cache.run(settings)
    before, real = contents(tmp_path / "cache"), tiny.SamTeacher.__call__
    with monkeypatch.context() as patch:  # a machine that computes a little differently
        patch.setattr(tiny.SamTeacher, "__call__", lambda *a: {k: v + 0.01 for k, v in real(*a).items()})
        cache.run(tiny.load(tmp_path, f"cache.root={tmp_path}/other"))
    other = (tmp_path / "other/train-001.tar").read_bytes()
    tar = tmp_path / "cache/train-001.tar"
    assert len(other) == tar.stat().st_size and other != tar.read_bytes()
    tar.write_bytes(other)
    with pytest.raises(UserError, match="1 shards are not cached yet, .*'train-001' first"):
        cache.verify(settings)
    cache.run(settings)
    assert contents(tmp_path / "cache") == before
    assert cache.verify(settings, samples=4)["shards"] == 4


def test_a_pair_that_disagrees_is_not_sent_to_a_bucket(tmp_path):
    far = (f"cache.root=file://{tmp_path}/bucket", f"cache.local={tmp_path}/here")
    cache.run(tiny.load(tmp_path, *far))
    names = {path.name for path in (tmp_path / "bucket").iterdir()}
    (here,) = (tmp_path / "here").iterdir()
    written(here, 1.0).publish()
    one = (here / "train-000.tar").read_bytes()
    (here / "train-000.json").unlink()
    written(here, 2.0).publish()
    (here / "train-000.tar").write_bytes(one)
    cache.open_cache(tiny.load(tmp_path, *far))
    assert {path.name for path in (tmp_path / "bucket").iterdir()} == names


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Return the toy recipe's overrides; of its shard train-001 no image can be decoded."""
    keys = set(build(tiny.load(tmp_path).images).source.keys("train-001"))
    encode = photos.Photos._encode
    monkeypatch.setattr(
        photos.Photos, "_encode", lambda self, key: Encoded(key, b"broken") if key in keys else encode(self, key)
    )
    return tmp_path


def test_a_shard_of_which_no_image_decodes_is_finished_and_counts_as_failed(broken, caplog):
    with pytest.raises(UserError, match="gave no output, more than cache.max_failed=0.01"):
        cache.run(tiny.load(broken, f"cache.root={broken}/strict"))
    settings = tiny.load(broken, "cache.max_failed=0.5", "cache.trim=true", "objective.embedding.padding=exclude")
    cache.run(settings)
    before = contents(broken / "cache")
    fields = sidecar.read(broken / "cache/train-001.json")
    assert fields is not None and fields["samples"] == [] and fields["statistics"] == {}
    assert [one["index"] for one in fields["failed"]] == list(range(8))
    cache.run(settings)
    assert contents(broken / "cache") == before
    opened = cache.open_cache(settings)
    assert [len(shard.samples) for shard in opened.shards["train"]] == [8, 0, 8]
    assert cache.verify(settings, samples=8)["shards"] == 4
    assert distill.run(settings).joinpath("student.safetensors").is_file()


def test_verify_without_the_teacher_s_file_tells_of_the_checksums_and_that_no_value_was_compared(
    tmp_path, monkeypatch, caplog
):
    size = ["images.train=4", "images.validation=4", "images.shard_size=2", "images.size=64"]
    weights = tmp_path / "teacher.safetensors"
    packaged = Path(cache.__file__).parents[1] / "mini/weights/sam_mini.safetensors"
    weights.write_bytes(packaged.read_bytes())
    teacher = ["teacher={name: sam_mini, device: cpu, weights: " + str(weights) + "}"]
    settings = tiny.load(tmp_path, *teacher, *size)
    cache.run(settings)
    weights.unlink()
    with caplog.at_level(logging.INFO, "fmdistill"):
        assert cache.verify(settings) == {"shards": 4}
    assert "every checksum of the 4 shards is right" in caplog.text
    assert f"no value was recomputed, since the teacher's file is gone: {weights}" in caplog.text
    with pytest.raises(UserError, match="codec.train is 'fp16' there and 'fp32' here"):
        cache.verify(tiny.load(tmp_path, *teacher, *size, "cache.codec=fp32", "images.validation=4"))
    tar = tmp_path / "cache/train-000.tar"
    tar.write_bytes(tar.read_bytes()[:600] + b"x" + tar.read_bytes()[601:])
    with pytest.raises(UserError, match="train-000.tar: .*checksum"):
        cache.verify(settings)
