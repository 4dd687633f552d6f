"""Tests of caching img2dataset's tars with their usual faults: these are counted or raise, and pairs stay right."""

import io
import random

import clips
import pytest
import tiny
import torch
from PIL import Image

from fmdistill import cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.images import decode
from fmdistill.registry import UserError

KEYS = [f"00000{n:04}" for n in range(12)]


def cached(folder, *overrides: str) -> CachedImages:
    """Cache the tars in `folder`; return the images of training with their outputs."""
    if not list(folder.glob("v*.tar")):
        clips.img2dataset(folder, "v0", ["v"])
    cache.run(clips.load(folder, *overrides))
    return CachedImages(cache.open_cache(clips.load(folder, *overrides)), "train")


def is_embedding_of(data: CachedImages, index: int, picture: bytes) -> bool:
    """Return whether a cached embedding is this picture's."""
    pixels, size = data.cache.preprocess.prepare(decode(picture))
    expected = clips.embed(data.cache.preprocess.normalize(pixels[None], torch.tensor([size])))[0]
    cached_embedding = tiny.item(data, 0, index)["outputs"]["clip.embedding"]
    return bool((cached_embedding - expected).norm() < 1e-3 * expected.norm())


def test_three_captions_whose_images_failed_to_download_are_counted(tmp_path, caplog):
    members = [(f"{key}.txt", b"a cat") for key in KEYS] + [(f"{key}.json", b"{}") for key in KEYS]
    members += [(f"{key}.jpg", clips.picture(n)) for n, key in enumerate(KEYS) if n not in (0, 5, 11)]
    clips.pack(tmp_path / "00000.tar", members)
    with caplog.at_level("WARNING"):
        data = cached(tmp_path)
    assert f"00000.tar: ignored 3 samples without an image (3 .json, 3 .txt), first '{KEYS[0]}'" in caplog.text
    assert data.shards[0].keys == [key for n, key in enumerate(KEYS) if n not in (0, 5, 11)]
    assert all(is_embedding_of(data, i, clips.picture(KEYS.index(key))) for i, key in enumerate(data.shards[0].keys))


def test_odd_keys_and_capitals_stay_distinct_with_their_captions(tmp_path):
    keys = ["a-v1", "a_v1", "a", "IMG_1", "img_1", "d.1/Ä b", "embedding", "%2E"]
    members = [(f"{key}.{'JPG' if key.isupper() else 'jpg'}", clips.picture(n)) for n, key in enumerate(keys)]
    members += [(f"{key}.{'TXT' if key.isupper() else 'txt'}", f"<{key}>".encode()) for key in keys]
    random.Random(0).shuffle(members)
    clips.pack(tmp_path / "00000.tar", members)
    data = cached(tmp_path)
    assert sorted(data.shards[0].keys) == sorted(keys)
    for index, key in enumerate(data.shards[0].keys):
        assert data.encoded(0, index).extra["txt"] == f"<{key}>".encode()
        assert [is_embedding_of(data, index, clips.picture(n)) for n in range(len(keys))] == [
            key == other for other in keys
        ]


def test_two_images_with_one_key_raise_one_line(tmp_path):
    clips.pack(tmp_path / "00000.tar", [("a.jpg", clips.picture(0)), ("a.txt", b"x"), ("a.png", clips.picture(1))])
    with pytest.raises(UserError, match=r"00000\.tar: the sample 'a' has several columns .* jpg, png; choose") as error:
        cached(tmp_path)
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").glob("0*"))


def test_an_empty_caption_is_counted_and_its_image_cached(tmp_path, caplog):
    clips.pack(tmp_path / "00000.tar", [("a.jpg", clips.picture(0)), ("a.txt", b""), ("b.jpg", clips.picture(1))])
    with caplog.at_level("WARNING"):
        data = cached(tmp_path)
    assert "00000.tar: 1 images have an empty caption, first 'a'" in caplog.text
    assert data.shards[0].keys == ["a", "b"]
    assert data.encoded(0, 0).extra["txt"] == b"" and "txt" not in data.encoded(0, 1).extra


def test_images_and_embeddings_are_paired_by_key_after_shuffling_and_dropping(tmp_path):
    pictures = {key: clips.picture(n) for n, key in enumerate(KEYS)}
    unknown_to_teacher, gone = {KEYS[2], KEYS[9]}, {KEYS[0], KEYS[6], KEYS[7]}
    members = [(f"{key}.jpg", b"broken" if key in unknown_to_teacher else data) for key, data in pictures.items()]
    clips.pack(tmp_path / "00000.tar", members)
    cached(tmp_path, "cache.max_failed=0.3")
    assert len({bytes(data) for data in pictures.values()}) == len(KEYS)
    for seed in range(3):
        members = [(f"{key}.jpg", data) for key, data in pictures.items() if key not in gone]
        random.Random(seed).shuffle(members)
        clips.pack(tmp_path / "00000.tar", members)
        data = cached(tmp_path, "cache.max_failed=0.3")
        assert not unknown_to_teacher & set(data.shards[0].keys) and len(data.shards[0].keys) == 10
        for index, key in enumerate(data.shards[0].keys):
            if key in gone:
                with pytest.raises(UserError, match=f"image '{key}' is cached but not among the images"):
                    tiny.item(data, 0, index)
            else:
                assert is_embedding_of(data, index, pictures[key])
                pixels = data.cache.preprocess.prepare(Image.open(io.BytesIO(pictures[key])))[0]
                assert torch.equal(tiny.item(data, 0, index)["pixels"], pixels)


def test_two_images_that_swap_names_raise(tmp_path):
    clips.pack(tmp_path / "00000.tar", [("a.jpg", clips.picture(0)), ("b.jpg", clips.picture(1))])
    cached(tmp_path)
    clips.pack(tmp_path / "00000.tar", [("a.jpg", clips.picture(1)), ("b.jpg", clips.picture(0))])
    with pytest.raises(UserError, match="image 'a' is not the one that the teacher saw"):
        cached(tmp_path).item(0, 0, 0)
