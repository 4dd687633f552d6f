"""A cache opened with webdataset: the reader's own samples, split and shuffled as webdataset does, checked, joined."""

import io
import pickle
import re
from pathlib import Path

import clips
import fsspec
import numpy as np
import pytest
import tiny
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from fmdistill import cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.images import build
from fmdistill.registry import UserError

SMALL = ("images.shard_size=2",)  # 12 shards of training images


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder with a cache of 24 and 8 maps; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("maps")
    cache.run(tiny.load(folder, *SMALL))
    return folder


def expected(recipe, split: str) -> dict[str, dict[str, np.ndarray]]:
    """What fmdistill's own reader says, by key."""
    readers = cache.open_cache(recipe).shards[split]
    return {key: reader.read(index) for reader in readers for index, key in enumerate(reader.keys)}


def assert_same(samples: list[dict], wanted: dict[str, dict[str, np.ndarray]]) -> None:
    assert [sample["__key__"] for sample in samples] == list(wanted)
    for sample in samples:
        outputs = {name: value for name, value in sample.items() if isinstance(value, np.ndarray)}
        assert outputs.keys() == wanted[sample["__key__"]].keys()
        for name, value in wanted[sample["__key__"]].items():
            assert outputs[name].dtype == np.float32 and np.array_equal(outputs[name], value)


@pytest.mark.parametrize(
    "settings", [("cache.codec=fp32",), ("cache.codec=int4", "cache.trim=true", "cache.similarity=true")]
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_samples_are_those_of_the_reader(tmp_path, settings, split):
    recipe = tiny.load(tmp_path, *settings, "objective.embedding.padding=exclude")
    cache.run(recipe)
    samples = list(cache.webdataset(tmp_path / "cache", split))
    assert isinstance(cache.webdataset(tmp_path / "cache"), wds.WebDataset)
    assert_same(samples, expected(recipe, split))
    assert {sample["embedding"].shape for sample in samples} == {(32, 4, 4)}
    assert not any("label" in sample or "image" in sample for sample in samples)


def with_tokens():
    return clips.teacher(tokens=True)


@pytest.mark.parametrize("teacher", ["clips:teacher", "test_cache_webdataset:with_tokens"])
def test_vectors_labels_and_keys_of_any_characters_come_sample_by_sample(tmp_path, teacher):
    keys = ["a/1", "b/\u00e9 %2E", "c"]
    members = [(f"{key}.{end}", data) for n, key in enumerate(keys) for end, data in clip_members(n)]
    clips.pack(tmp_path / "00000.tar", members)
    clips.pack(tmp_path / "v0.tar", [("v.jpg", clips.picture(7))])
    recipe = clips.load(tmp_path, f"teacher.name={teacher}")
    cache.run(recipe)
    samples = list(cache.webdataset(tmp_path / "cache", images=True))
    assert [sample["__key__"] for sample in samples] == keys
    assert [sample.get("label") for sample in samples] == [0, 3, None]
    for number, sample in enumerate(samples):
        assert np.array_equal(sample.pop("image"), np.asarray(Image.open(io.BytesIO(clips.picture(number)))))
    assert_same(samples, expected(recipe, "train"))
    assert samples[0]["embedding"].shape == (24,) and ("tokens" in samples[0]) == ("tokens" in teacher)


def clip_members(number: int) -> list[tuple[str, bytes]]:
    return [("jpg", clips.picture(number)), *([("cls", str(3 * number).encode())] if number < 2 else [])]


def test_two_nodes_of_two_workers_see_each_sample_once(made, monkeypatch):
    seen: list[str] = []
    for node in range(2):
        monkeypatch.setenv("RANK", str(node))
        monkeypatch.setenv("WORLD_SIZE", "2")
        dataset = cache.webdataset(made / "cache", nodesplitter=wds.split_by_node, workersplitter=wds.split_by_worker)
        loader = DataLoader(dataset, batch_size=None, num_workers=2)
        here = [sample["__key__"] for sample in loader]
        assert len(here) == 12
        seen += here
    assert sorted(seen) == sorted(expected(tiny.load(made, *SMALL), "train")) and len(set(seen)) == 24
    with pytest.raises(ValueError, match="nodesplitter"):  # webdataset's own warning of more nodes than one
        list(cache.webdataset(made / "cache"))


def test_shuffling_changes_the_order_and_not_the_content(made):
    wanted = expected(tiny.load(made, *SMALL), "train")
    by_shards = list(cache.webdataset(made / "cache", shardshuffle=100, seed=1))
    by_samples = list(cache.webdataset(made / "cache").shuffle(24, initial=24, seed=1))
    for samples in (by_shards, by_samples):
        keys = [sample["__key__"] for sample in samples]
        assert keys != list(wanted) and sorted(keys) == sorted(wanted)
        assert_same(samples, {key: wanted[key] for key in keys})
    pairs = [sample["__key__"] for sample in by_shards]
    assert {frozenset(pairs[i : i + 2]) for i in range(0, 24, 2)} == {
        frozenset(list(wanted)[i : i + 2]) for i in range(0, 24, 2)
    }


def test_the_pipeline_goes_on_as_any_of_webdataset_s_and_to_another_process(made):
    dataset = pickle.loads(pickle.dumps(cache.webdataset(made / "cache")))
    batches = list(dataset.to_tuple("__key__", "embedding").batched(10))
    assert [maps.shape for _, maps in batches] == [(10, 32, 4, 4), (10, 32, 4, 4), (4, 32, 4, 4)]
    repeated = cache.webdataset(made / "cache", resampled=True).with_epoch(50)
    assert len(list(repeated)) == 50


def copied(made: Path, to: Path) -> Path:
    to.mkdir()
    for path in (made / "cache").iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_damaged_member_is_an_error_or_left_out_as_the_handler_says(made, tmp_path):
    folder = copied(made, tmp_path / "cache")
    wanted = expected(tiny.load(made, *SMALL), "train")
    reader = cache.open_cache(tiny.load(made, *SMALL)).shards["train"][1]
    damaged = bytearray((folder / reader.path.name).read_bytes())
    damaged[reader.samples[1]["outputs"]["embedding"]["offset"] + 300] ^= 4
    (folder / reader.path.name).write_bytes(damaged)
    dataset = cache.webdataset(folder)
    says = rf"{reader.path.name}: the embedding of '{reader.keys[1]}' is damaged \(checksum\)"
    with pytest.raises(UserError, match=says):
        list(dataset)
    skipping = cache.webdataset(folder, handler=wds.ignore_and_continue)
    assert_same(list(skipping), {key: value for key, value in wanted.items() if key != reader.keys[1]})
    with pytest.raises(UserError, match=says):  # in a loader's worker
        list(DataLoader(dataset, batch_size=None, num_workers=1))
    (folder / reader.path.name).unlink()
    with pytest.raises(UserError, match=rf"{reader.path.name}: deleted or damaged since the cache was opened"):
        list(dataset)
    keys = {sample["__key__"] for sample in cache.webdataset(folder)}
    assert keys == set(wanted) - set(reader.keys)  # opened anew, what is not finished is not in it


@pytest.mark.slow
def test_a_shard_that_the_limit_cut_is_whole_as_far_as_it_goes(tmp_path):
    recipe = tiny.load(tmp_path, "images.limit=11")
    cache.run(recipe)
    assert_same(list(cache.webdataset(tmp_path / "cache")), expected(recipe, "train"))


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_cache_behind_a_url_gives_the_same_samples(made, tmp_path, scheme):
    url = f"{scheme}://{tmp_path}/bucket"
    settings = tiny.load(made, *SMALL, f"cache.root={url}", f"cache.local={tmp_path}/one")
    cache.run(settings)
    dataset = cache.webdataset(url, images=True, local_folder=str(tmp_path / "two"), local_gb=2e-5)
    samples = list(dataset)
    assert all(sample["__url__"].startswith(f"{url}/train-") for sample in samples)
    assert len(list((tmp_path / "two").glob("*/train-*.tar"))) < 12  # of 20 kB
    for sample in samples:
        assert sample.pop("image").shape[2] == 3
    assert_same(samples, expected(tiny.load(made, *SMALL), "train"))
    file = fsspec.filesystem(scheme)
    tar = next(path for path in file.ls(f"{tmp_path}/bucket", detail=False) if "train-000" in path and ".tar" in path)
    file.pipe_file(tar, b"x" + file.cat_file(tar)[1:])
    with pytest.raises(UserError, match="differs from its sidecar"):
        list(cache.webdataset(url, local_folder=str(tmp_path / "three")))


def test_images_are_those_that_the_teacher_saw(made, tmp_path):
    recipe = tiny.load(made, *SMALL)
    data = CachedImages(cache.open_cache(recipe), "train")
    decoded = [
        data.cache.images.decode(data.encoded(s, i), "") for s, count in enumerate(data.counts) for i in range(count)
    ]
    for images in (True, recipe, build(recipe.images)):
        found = [sample["image"] for sample in cache.webdataset(made / "cache", images=images)]
        assert all(np.array_equal(a, b) for a, b in zip(found, decoded, strict=True)) and found[0].dtype == np.uint8
    other = build({**recipe.images, "seed": 5})
    with pytest.raises(UserError, match="is not the one that the teacher saw"):
        list(cache.webdataset(made / "cache", images=other))
    with pytest.raises(UserError, match="the teacher saw the images with images.decoding.orientation 'apply'"):
        cache.webdataset(made / "cache", images=build({**recipe.images, "orientation": "ignore"}))
    folder = copied(made, tmp_path / "cache")
    (folder / "recipe.yaml").write_text("images: {name: 'somebody:Source'}")
    with pytest.raises(UserError, match=r"recipe\.yaml: its images name code outside fmdistill \(somebody:Source\)"):
        cache.webdataset(folder, images=True)
    (folder / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"recipe\.yaml: missing, so give images="):
        cache.webdataset(folder, images=True)


def test_what_cannot_be_opened_is_one_line(made, tmp_path):
    with pytest.raises(UserError, match="split='test': expected one of train, validation"):
        cache.webdataset(made / "cache", "test")
    with pytest.raises(UserError, match="no cache here"):
        cache.webdataset(tmp_path)
    with pytest.raises(UserError, match="select_files='x': has no effect on a cache"):
        cache.webdataset(made / "cache", select_files="x")
    folder = copied(made, tmp_path / "cache")
    for path in folder.glob("train-*"):
        path.unlink()
    with pytest.raises(UserError, match="no shard of split=train is finished; run `fmdistill cache"):
        cache.webdataset(folder)
    assert len(list(cache.webdataset(folder, "validation"))) == 8


def test_the_page_s_python_runs(made, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs/webdataset.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    (tmp_path / "caches").mkdir()
    copied(made, tmp_path / "caches/sam")
    url = f"file://{tmp_path}/bucket"
    cache.run(tiny.load(made, *SMALL, f"cache.root={url}", f"cache.local={tmp_path}/one"))
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks:
        exec(block.replace("s3://bucket/caches/sam", url), namespace)
    assert "(16, 32, 4, 4)" in capsys.readouterr().out
