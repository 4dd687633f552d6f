"""A cache of vectors: rows of one member a shard, behind the same reader, joined to images by key."""

import io
import json
import tarfile

import clips
import numpy as np
import open_clip
import pytest
import tiny
import torch
import webdataset
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from fmdistill import cache
from fmdistill.backbones.clip import TextHead
from fmdistill.cache import sidecar, stage
from fmdistill.cache.codec import CODECS
from fmdistill.cache.dataset import CachedImages
from fmdistill.images import unescape
from fmdistill.registry import UserError
from fmdistill.teachers.output import Output

KEYS = [f"00000{n:04}" for n in range(9)]
TRANSFORM = image_transform_v2(PreprocessCfg(**{**clips.PREPROCESS_CFG, "size": 32}), is_train=False)


def with_tokens():
    return clips.teacher(tokens=True)


@pytest.fixture
def made(tmp_path):
    """A cached folder of two tars of nine images, and one of validation."""
    for name in ("00000", "00001", "v0"):
        clips.img2dataset(tmp_path, name, [f"{name}{key}" for key in KEYS])
    cache.run(clips.load(tmp_path))
    return tmp_path


def expected(data: CachedImages, shard: int, index: int) -> torch.Tensor:
    """What open_clip itself says of the stored image."""
    picture = Image.open(io.BytesIO(data.encoded(shard, index).data))
    return clips.embed(TRANSFORM(picture)[None])[0]


def test_a_cache_holds_encode_image_to_fp16_s_rounding_and_exactly_for_validation(made):
    opened = cache.open_cache(clips.load(made))
    assert opened.shapes == {"embedding": (24,)} and opened.family == "clip" and isinstance(opened.head(), TextHead)
    for split, step in (("train", 2.0**-11), ("validation", 0.0)):
        data = CachedImages(opened, split)
        for shard, count in enumerate(data.counts):
            for index in range(count):
                found = tiny.item(data, shard, index)["outputs"]["clip.embedding"]
                wanted = expected(data, shard, index)
                assert found.shape == (24,) and found.dtype == torch.float32
                assert ((found - wanted).abs() <= wanted.abs() * step + 1e-5 * wanted.norm()).all()
                assert not 0.9 < found.norm() < 1.1  # not normalised


def test_a_shard_holds_one_plain_array_in_the_order_of_its_samples(made):
    reader = cache.open_cache(clips.load(made)).shards["train"][1]
    with tarfile.open(reader.path) as archive:
        member, seal = archive.getmembers()
        assert seal.name == "__sha256__"
        rows = np.load(io.BytesIO(archive.extractfile(member).read()), allow_pickle=False)
    assert member.name == "embedding.npy" and member.mtime == 0
    assert rows.shape == (9, 24) and rows.dtype == np.float16
    (sample,) = webdataset.WebDataset(str(reader.path), shardshuffle=False).decode()
    assert np.array_equal(sample["npy"], rows)
    for index, row in enumerate(rows):
        assert np.array_equal(reader.read(index)["embedding"], row.astype(np.float32))
    sidecar = json.loads(reader.path.with_suffix(".json").read_text())
    valid, padded = (sidecar["statistics"]["embedding"][kind] for kind in ("valid", "padded"))
    assert valid["count"] == 9 and padded["count"] == 0
    np.testing.assert_allclose(valid["sum"], rows.astype(float).sum(0), atol=0.05)


def test_running_again_changes_nothing_and_a_lost_shard_comes_back_the_same(made):
    before = {p.name: p.read_bytes() for p in (made / "cache").iterdir()}
    (made / "cache/00000.tar").unlink()
    (made / "cache/00001.json").write_text("{")
    cache.run(clips.load(made))
    assert {p.name: p.read_bytes() for p in (made / "cache").iterdir()} == before
    assert cache.verify(clips.load(made), samples=64)["mean_cosine"] > 0.99999
    with pytest.raises(UserError, match="this cache is another one: teacher.weights"):
        cache.run(clips.load(made, "teacher.seed=1"))


def test_a_flipped_byte_of_a_row_is_found_at_its_first_read_and_by_verify(made):
    reader = cache.open_cache(clips.load(made)).shards["train"][0]
    damaged = bytearray(reader.path.read_bytes())
    damaged[reader.samples[3]["outputs"]["embedding"]["offset"] + 40] ^= 4
    reader.path.write_bytes(damaged)
    assert reader.read(2)["embedding"].shape == reader.read(4)["embedding"].shape == (24,)
    for use in (lambda: reader.read(3), lambda: cache.verify(clips.load(made))):
        with pytest.raises(UserError, match=f"the embedding of '{reader.keys[3]}' is damaged"):
            use()


def test_a_broken_image_leaves_no_row_and_a_shard_of_broken_ones_no_rows(tmp_path):
    members = [(f"{key}.jpg", b"broken" if n in (0, 4) else clips.picture(n)) for n, key in enumerate(KEYS)]
    clips.pack(tmp_path / "00000.tar", members)
    clips.img2dataset(tmp_path, "v0", KEYS[:2])
    cache.run(clips.load(tmp_path, "cache.max_failed=0.5"))
    data = CachedImages(cache.open_cache(clips.load(tmp_path, "cache.max_failed=0.5")), "train")
    assert data.shards[0].keys == [key for n, key in enumerate(KEYS) if n not in (0, 4)]
    for index in range(7):
        found = tiny.item(data, 0, index)["outputs"]["clip.embedding"]
        assert (found - expected(data, 0, index)).norm() < 1e-2
    clips.pack(tmp_path / "00001.tar", [("a.jpg", b"broken"), ("b.jpg", b"broken")])
    with pytest.raises(UserError, match="00001: 2 of 2 images gave no output, more than cache.max_failed=0.5"):
        cache.run(clips.load(tmp_path, "cache.max_failed=0.5"))
    assert not (tmp_path / "cache/00001.tar").exists() and not list((tmp_path / "cache").glob(".*.tmp"))
    cache.run(clips.load(tmp_path, "cache.max_failed=1"))
    fields = sidecar.read(tmp_path / "cache/00001.json")
    assert fields is not None and not fields["samples"]
    assert [(one["key"], one["index"]) for one in fields["failed"]] == [("a", 0), ("b", 1)]


def test_patch_tokens_are_the_tower_s_own_beside_the_stacked_embedding(tmp_path):
    for name in ("00000", "v0"):
        clips.img2dataset(tmp_path, name, KEYS[:3])
    recipe = clips.load(tmp_path, "teacher.name=test_cache_clip:with_tokens", "cache.codec=fp32")
    cache.run(recipe)
    opened, model = cache.open_cache(recipe), clips.model()
    assert opened.shapes == {"embedding": (24,), "tokens": (32, 4, 4)}
    model.visual.output_tokens = True
    data = CachedImages(opened, "train")
    for index in range(3):
        picture = Image.open(io.BytesIO(data.encoded(0, index).data))
        with torch.no_grad():
            pooled, tokens = model.visual(TRANSFORM(picture)[None])
        outputs = tiny.item(data, 0, index)["outputs"]
        assert torch.allclose(outputs["clip.embedding"], pooled[0], atol=1e-5)
        assert torch.allclose(outputs["clip.tokens"].flatten(1).T, tokens[0], atol=1e-5)
    with tarfile.open(data.shards[0].path) as archive:
        names = archive.getnames()
    assert [unescape(n.partition(".")[0]) for n in names[:3]] == KEYS[:3] and names[3] == "embedding.npy"
    assert cache.verify(recipe)["samples"] == 6


def test_a_tower_without_patch_tokens_is_said():
    from fmdistill.teachers.clip import ClipTeacher

    vision = {"timm_model_name": "tiny_vit_5m_224", "timm_pool": "avg", "timm_proj": "linear", "image_size": 224}
    config = {**clips.CONFIG, "model_cfg": {**clips.MODEL_CFG, "vision_cfg": vision}}
    model = open_clip.CLIP(**config["model_cfg"])
    settings = {"name": "t", "kind": "TinyViT", "device": "cpu", "dtype": "fp32", "batch": 1, "workers": 1}
    with pytest.raises(
        UserError, match=r"teacher\.tokens=true: the image tower of TinyViT \(TimmModel\) returns no patch"
    ):
        ClipTeacher(model, config, tokens=True, **settings)
    assert ClipTeacher(model, config, tokens=False, **settings).outputs == {"embedding": Output((24,))}


def test_the_fingerprint_tells_weights_towers_quick_gelu_and_outputs_apart():
    first, other = clips.teacher().fingerprint(), clips.teacher(seed=1).fingerprint()
    assert first == clips.teacher().fingerprint() and first["weights"] != other["weights"]
    assert first["quick_gelu"] is True and first["normalized"] is False and first["tokens"] is False
    assert clips.teacher(tokens=True).fingerprint() != first != clips.teacher(dtype="bf16").fingerprint()
    assert json.loads(json.dumps(first)) == first and first["preprocess"]["name"] == "clip"


def test_the_space_asked_for_is_what_the_cache_takes(made, monkeypatch):
    taken = sum(p.stat().st_size for p in (made / "cache").iterdir() if p.name[0] in "0v")
    told = []
    monkeypatch.setattr(stage.log, "info", lambda text, *values: told.append((text, values)))
    cache.run(clips.load(made, f"cache.root={made}/again"))
    (asked,) = [values[2] * 1e9 for text, values in told if "images to cache" in text]
    assert 0.4 * taken < asked < 1.2 * taken  # of so few images, much is the sidecars' own and the tars' padding
    assert CODECS["fp16"].size((10_000, 512)) == pytest.approx(1024 * 10_000, rel=1e-3)


@pytest.mark.parametrize("how", ["folder", "file"])
def test_a_finished_cache_needs_the_weights_no_more(tmp_path, caplog, monkeypatch, how):
    for name in ("00000", "v0"):
        clips.img2dataset(tmp_path, name, KEYS[:3])
    local = clips.folder(tmp_path / "toy")
    place = tmp_path / "toy"
    settings = ["teacher.name=open_clip", f"teacher.model={local}", "teacher.device=cpu"]
    if how == "file":
        place = tmp_path / "toy/open_clip_model.safetensors"
        settings = ["teacher.name=open_clip", "teacher.model=toy", f"teacher.pretrained={place}", "teacher.device=cpu"]
        monkeypatch.setattr(open_clip, "list_models", lambda: ["toy"])
        monkeypatch.setattr(open_clip, "get_model_config", lambda _: json.loads(json.dumps(clips.MODEL_CFG)))
        monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: with_preprocess())
    found = cache.run(clips.load(tmp_path, *settings))
    assert found["teacher"]["model"] == ("toy" if how == "file" else "local-dir") and str(tmp_path) not in str(found)
    place.rename(tmp_path / "away")
    with caplog.at_level("INFO"):
        assert cache.run(clips.load(tmp_path, *settings)) == found
    assert "the teacher's file is gone, and not needed" in caplog.text
    with pytest.raises(UserError, match="teacher.tokens is False there and True here"):
        cache.run(clips.load(tmp_path, *settings, "teacher.tokens=true"))
    if how == "file":
        with pytest.raises(
            UserError, match=r"teacher.preprocess.mean is \[0.5, 0.4, 0.3\] there and \[0.1, 0.1, 0.1\]"
        ):
            cache.run(clips.load(tmp_path, *settings, "teacher.mean=[0.1,0.1,0.1]"))
    (tmp_path / "cache/00000.json").unlink()  # there is work for the teacher
    with pytest.raises(UserError, match="neither a file nor a tag" if how == "file" else "open_clip_config"):
        cache.run(clips.load(tmp_path, *settings))


def with_preprocess():
    made = clips.model(9)
    made.visual.preprocess_cfg = clips.PREPROCESS_CFG
    return made


def test_a_teacher_without_weights_is_asked_for():
    from fmdistill.teachers.clip import open_clip as build

    with pytest.raises(UserError, match=r"teacher\.pretrained: not set; set it to one of open_clip's tags"):
        build("ViT-B-32")
