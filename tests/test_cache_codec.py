"""Codecs: within their step on any values, readable by numpy alone, trimmed to the valid tokens, damage found."""

import dataclasses
import io
import json

import numpy as np
import pytest
import tiny
import torch
import webdataset

from fmdistill import cache, pipeline
from fmdistill.cache import outputs, sidecar
from fmdistill.cache.codec import CODECS, named
from fmdistill.cache.dataset import CachedImages
from fmdistill.cache.outputs import chosen
from fmdistill.cache.reader import ShardReader
from fmdistill.cache.store import Folder
from fmdistill.cache.verification import verify_values
from fmdistill.cache.writer import ShardWriter, TeacherInput
from fmdistill.images import Shard
from fmdistill.recipe import CacheSettings
from fmdistill.registry import UserError
from fmdistill.teachers.output import Output

DRAWN = np.random.default_rng(0).normal(size=(6, 5, 7)).astype(np.float32)
CHANNEL = np.array([1, 1, 1, 1000, 1, 1], np.float32)[:, None, None]
HOSTILE = {
    "drawn": DRAWN,
    "zeros": np.zeros_like(DRAWN),
    "denormals": DRAWN * np.float32(1e-39),
    "denormals of float16": DRAWN * np.float32(1e-6),
    "one huge channel": DRAWN * CHANNEL,
    "one huge token": np.where(np.arange(7) == 3, 1e4 * DRAWN, DRAWN),
    "constant": np.full_like(DRAWN, -3.7),
    "vector": DRAWN[0, 0],
}


def by_numpy(codec: str, stored: np.ndarray, width: int) -> np.ndarray:
    """What writer.py tells a user of numpy to do."""
    if codec in ("fp32", "fp16"):
        return stored
    if codec == "bf16":
        return (stored.astype("<u4") << 16).view("<f4")
    value = stored["value"]
    if codec == "int4":
        value = np.stack([value << 4 >> 4, value >> 4], -1).reshape(*stored.shape, -1)[..., :width]
    return value * stored["scale"][..., None].astype("<f4")


@pytest.mark.parametrize("values", HOSTILE)
@pytest.mark.parametrize("name", CODECS)
def test_what_is_read_is_within_the_step_and_numpy_reads_the_same(name, values):
    codec, array = CODECS[name], HOSTILE[values]
    data = codec.encode(array)
    stored = np.load(io.BytesIO(data), allow_pickle=False)
    found = codec.decode(codec.pack(array), array.shape)
    assert found.shape == array.shape and found.dtype == np.float32
    assert np.array_equal(found, by_numpy(name, stored, array.shape[-1]))
    assert np.abs(found - array).max() <= np.abs(array).max() * codec.step + codec.least
    assert codec.size(array.shape) == 512 + -(-len(data) // 512) * 512
    if values == "drawn" and codec.step:  # the step is not far above what happens, so a wrong rounding is noticed
        assert np.abs(found - array).max() > np.abs(array).max() * codec.step / 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3.4e38])
def test_a_value_beyond_the_codec_is_refused_by_its_name(bad):
    array = DRAWN.copy()
    array[1, 2, 3] = bad
    for name, codec in CODECS.items():
        if name == "fp32" and np.isfinite(bad):
            assert np.array_equal(codec.decode(codec.pack(array), array.shape), array)
        else:
            with pytest.raises(OverflowError, match=f"a value of .* does not fit {name}"):
                codec.pack(array)


def test_the_bytes_stay_what_they_were():
    array = np.array([[[1.0, -2.0, 0.5], [0.25, 0.0, 12.7]]], np.float32)
    golden = {
        "fp32": np.array([1, -2, 0.5, 0.25, 0, 12.7], "<f4").tobytes().hex(),
        "fp16": "003c00c000380034" + "0000" + "5a4a",
        "bf16": "803f00c0003f803e" + "0000" + "4b41",
        "int8": "0824" + "408120" + "662e" + "03007f",
        "int4": "9234" + "9402" + "423f" + "0007",
    }
    for name, expected in golden.items():
        data = CODECS[name].encode(array)
        assert data[-len(expected) // 2 :].hex() == expected, name
        assert len(data) == len(CODECS[name].header(array.shape)) + len(expected) // 2


def test_a_codec_is_found_by_its_label():
    for name, codec in CODECS.items():
        assert named(name) == codec and not codec.trim
        trimmed = named(f"{name}-trimmed")
        assert trimmed == dataclasses.replace(codec, trim=True) and trimmed.label == f"{name}-trimmed"
    with pytest.raises(UserError, match=r"codec 'int9': unknown.*int8"):
        named("int9")


@pytest.mark.parametrize("name", CODECS)
def test_a_shard_of_each_codec_holds_trimmed_the_valid_tokens_of_the_full_one(tmp_path, name):
    """Landscape and portrait maps, one that is all valid, and vectors of an odd width; webdataset reads them too."""
    rng, shapes = np.random.default_rng(1), {"embedding": (6, 8, 8), "vector": (5,)}
    maps = [{k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()} for _ in range(4)]
    sizes = [(5, 8), (8, 3), (8, 8), (1, 8)]
    codecs = {"full": CODECS[name], "trimmed": named(f"{name}-trimmed")}
    readers = {k: shard(tmp_path / k, codec, maps, sizes, shapes) for k, codec in codecs.items()}
    for index, (height, width) in enumerate(sizes):
        full, trimmed = (readers[kind].read(index) for kind in codecs)
        assert np.array_equal(trimmed["vector"], full["vector"])
        found = trimmed["embedding"]
        assert found.shape == (6, 8, 8) and not found[:, height:].any() and not found[:, :, width:].any()
        cut = maps[index]["embedding"][:, :height, :width]
        error = np.abs(found[:, :height, :width] - cut).max()
        assert error <= np.abs(cut).max() * codecs["full"].step + codecs["full"].least
        if name in ("fp32", "fp16", "bf16") or width == 8:  # else a row's scale is of fewer tokens
            assert np.array_equal(found[:, :height, :width], full["embedding"][:, :height, :width])
    sizes_of = [sum(one["outputs"]["embedding"]["size"] for one in reader.samples) for reader in readers.values()]
    assert sizes_of[1] < sizes_of[0]
    sidecars = [json.loads(r.path.with_suffix(".json").read_text()) for r in readers.values()]
    assert (
        sidecars[0]["statistics"] == sidecars[1]["statistics"]
        and sidecars[1]["codecs"]["embedding"] == f"{name}-trimmed"
    )
    samples = [s for s in webdataset.WebDataset(str(readers["trimmed"].path), shardshuffle=False).decode()]
    for index, (height, width) in enumerate(sizes):
        read = by_numpy(name, samples[index]["embedding.npy"], width)
        assert np.array_equal(read, readers["trimmed"].read(index)["embedding"][:, :height, :width])


def shard(root, codec, maps, sizes, shapes) -> ShardReader:
    root.mkdir()
    given = {name: Output(shape, "image" if len(shape) == 3 else None) for name, shape in shapes.items()}
    stored = outputs.stored(given, CacheSettings(root=str(root), codec=codec.name, trim=codec.trim))
    writer = ShardWriter(Folder(root), Shard("train-000", "train"), "x", stored)
    for index, (values, (height, width)) in enumerate(zip(maps, sizes, strict=True)):
        valid = np.zeros((8, 8), bool)
        valid[:height, :width] = True
        writer.add(TeacherInput(index, f"image-{index}", "0", None, (8, 8), (height, width)), values, valid)
    writer.publish()
    shard = Shard("train-000", "train")
    finished = sidecar.finished(Folder(root), shard, "x", stored)
    assert finished is not None
    return ShardReader(Folder(root), shard, finished, "", stored)


def test_embeddings_of_a_3_2_image_take_the_bytes_that_the_docs_state():
    full, trimmed = (256, 64, 64), (256, 43, 64)
    sizes = {name: (codec.size(full) / 1e6, codec.size(trimmed) / 1e6) for name, codec in CODECS.items()}
    assert sizes["int8"][0] < 1.1 and sizes["int8"][1] < 0.75 and sizes["int4"][0] < 0.6 and sizes["int4"][1] < 0.4
    assert round(sizes["fp32"][0], 1) == 4.2 and round(sizes["fp16"][0], 1) == round(sizes["bf16"][0], 1) == 2.1


def test_auto_is_int8_for_a_teacher_of_maps_and_fp16_for_one_of_vectors(tmp_path):
    found = {}
    for name in ("tiny:teacher", "clips:teacher"):
        (tmp_path / name[:4]).mkdir()
        recipe = tiny.load(tmp_path / name[:4], "cache.codec=auto", f"teacher.name={name}", "images.limit=2")
        cache.run(recipe)
        found[name] = cache.open_cache(recipe).manifest["outputs"]["embedding"]["codec"]["train"]
    assert found == {"tiny:teacher": "int8", "clips:teacher": "fp16"}
    assert chosen("auto", {"a": Output((2, 3, 3), "all"), "b": Output((4,))}) == "fp16"
    assert chosen("int4", {"a": Output((4,))}) == "int4"
    with pytest.raises(
        UserError, match=r"'int8' there and 'fp32' here.*Go on with it by cache\.codec=int8 cache\.trim"
    ):
        cache.run(tiny.load(tmp_path / "tiny", "cache.codec=fp32", "images.limit=2"))


@pytest.mark.parametrize("settings", [["int8", "false"], ["int8", "true"], ["int4", "true"], ["bf16", "false"]])
def test_a_cache_in_each_codec_agrees_with_its_teacher_and_stays_exact_for_validation(tmp_path, settings):
    codec, trim = settings
    recipe = tiny.load(tmp_path, f"cache.codec={codec}", f"cache.trim={trim}", *EXCLUDE)
    cache.run(recipe)
    found = cache.verify(recipe, samples=64)
    assert found["samples"] == 32 and 0 < found["largest_error"]
    opened, label = cache.open_cache(recipe), codec + "-trimmed" * (trim == "true")
    assert opened.manifest["outputs"]["embedding"]["codec"] == {"train": label, "validation": "fp32"}
    data, model = CachedImages(opened, "validation"), tiny.teacher()
    item = tiny.item(data, 0, 0)
    fresh = model(item["pixels"][None], item["sizes"][None])["embedding"][0]
    assert (
        torch.allclose(item["outputs"]["sam.embedding"], fresh, atol=1e-5)
        and data.shards[0].codecs["embedding"].name == "fp32"
    )
    assert "shape" not in data.shards[0].samples[0]["outputs"]["embedding"]
    with pytest.raises(UserError, match=f"codec.train is '{label}' there and 'fp16' here"):
        cache.run(tiny.load(tmp_path))


def test_verify_notices_other_values_in_a_trimmed_cache(tmp_path):
    recipe = tiny.load(tmp_path, "cache.codec=int8", "cache.trim=true", *EXCLUDE)
    cache.run(recipe)
    opened = cache.open_cache(recipe)
    assert verify_values(opened, tiny.teacher(), 64)["samples"] == 32
    with pytest.raises(UserError, match=r"train-000\.tar: embedding of '.*' differs from the teacher's by"):
        verify_values(opened, tiny.teacher(seed=1), 64)


@pytest.mark.parametrize("trim", ["true", "false"])
@pytest.mark.parametrize("codec", ["int8", "int4", "bf16"])
def test_a_flipped_byte_of_any_part_is_found(tmp_path, codec, trim):
    recipe = tiny.load(tmp_path, f"cache.codec={codec}", f"cache.trim={trim}", *EXCLUDE)
    cache.run(recipe)
    path = tmp_path / "cache/train-001.tar"
    whole = path.read_bytes()
    member = cache.open_cache(recipe).shards["train"][1].samples[2]["outputs"]["embedding"]
    start, size = member["offset"], member["size"]
    for place in (start, start + 100, start + size // 2, start + size - 1):  # header, scales, values, the last byte
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        reader = cache.open_cache(recipe).shards["train"][1]
        reader.read(1)
        with pytest.raises(UserError, match=rf"train-001\.tar: the embedding of '{reader.keys[2]}' is damaged"):
            reader.read(2)
        with pytest.raises(UserError, match=rf"train-001\.tar: the embedding of '{reader.keys[2]}' is damaged"):
            cache.verify(recipe)
    for place in (10, start - 300, len(whole) - 1):  # tar headers and the end
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train-001\.tar: bytes outside its members"):
            cache.verify(recipe)
    path.write_bytes(whole)
    reader = cache.open_cache(recipe).shards["train"][1]
    path.write_bytes(whole[: start + size // 2])
    with pytest.raises(UserError, match="is damaged"):
        reader.read(2)


EXCLUDE = ("objective.embedding.padding=exclude",)


def test_a_trimmed_cache_is_refused_where_padding_is_needed_naming_the_options(tmp_path):
    with pytest.raises(
        UserError, match=r"objective\.embedding\.padding=include.*padding=exclude, or cache\.trim=false"
    ):
        pipeline.check(tiny.load(tmp_path, "cache.trim=true"))
    pipeline.check(tiny.load(tmp_path, "cache.trim=true", *EXCLUDE))
    (tmp_path / "floors.yaml").write_text("name: grid_miou\ngrids: [2]\nfloors: true\n")
    recipe = tiny.load(tmp_path, "cache.trim=true", *EXCLUDE)
    with pytest.raises(UserError, match=r"floors=true.*cache\.trim=false, or .* floors=false"):
        pipeline.check(dataclasses.replace(recipe, protocols=[str(tmp_path / "floors.yaml")]))
    for name in ("clip_mini", "classifier"):
        wrong = tiny.load(tmp_path, "cache.trim=true", f"teacher.name={name}", *EXCLUDE)
        with pytest.raises(UserError, match=rf"cache\.trim=true: teacher\.name={name} pads no image.*leave `trim` out"):
            pipeline.check(wrong)


def unpadded() -> tiny.SamTeacher:
    """A teacher of someone's own whose images fill the square."""
    made = tiny.teacher()
    made.preprocess = Filled(made.preprocess.image_size, made.preprocess.stride)
    made.outputs = {"embedding": Output(made.outputs["embedding"].shape, "all")}
    return made


class Filled(type(tiny.teacher().preprocess)):
    def valid(self, sizes):
        return torch.ones_like(super().valid(sizes))


def test_a_teacher_of_one_s_own_that_pads_nothing_cannot_be_trimmed(tmp_path):
    recipe = tiny.load(tmp_path, "cache.trim=true", "teacher.name=test_cache_codec:unpadded", *EXCLUDE)
    with pytest.raises(UserError, match=r"cache\.trim=true: SamTeacher pads no image"):
        cache.run(recipe)
    assert not list((tmp_path / "cache").glob("*.tar"))
