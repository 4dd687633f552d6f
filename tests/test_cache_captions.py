"""Captions in a cache: the text tower's embeddings beside the images', by the same pass, and drawn in training."""

import logging
import shutil
from pathlib import Path

import clips
import open_clip
import pytest
import torch

from fmdistill import cache, images, pipeline
from fmdistill.cache import captions, manifest, stage
from fmdistill.cache.captions import number
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill import provider
from fmdistill.distill.loader import batches
from fmdistill.registry import UserError

COUNT = 6
ONE = ["teacher.captions=1"]


def texts_of(key: str) -> list[str]:
    """The captions of an image: one, two or three."""
    return [f"{word} {key}" for word in ("a picture of", "the", "about")][: 1 + int(key[-1]) % 3]


def write(folder: Path, name: str, count: int = COUNT, without: tuple[int, ...] = ()) -> None:
    members = []
    for index in range(count):
        key = f"{name}{index:04}"
        members.append((f"{key}.jpg", clips.picture(sum(map(ord, key)))))
        if index not in without:
            members.append((f"{key}.txt", "\n".join(texts_of(key)).encode()))
    clips.pack(folder / f"{name}.tar", members)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder of two tars and one of validation, cached with three captions of each image."""
    folder = tmp_path_factory.mktemp("captions")
    for name in ("00000", "00001", "v0"):
        write(folder, name)
    cache.run(clips.load(folder, "teacher.captions=3"))
    return folder


def encode(texts: list[str]) -> torch.Tensor:
    """What open_clip says of texts, for the toy CLIP."""
    with torch.no_grad():
        return clips.model().eval().encode_text(open_clip.SimpleTokenizer(context_length=16)(texts))


def test_a_cache_holds_the_text_towers_embeddings_of_the_first_captions_and_repeats_them_in_turn(made):
    opened = cache.open_cache(clips.load(made))
    assert opened.shapes == {name: (24,) for name in ("embedding", "caption", "caption_2", "caption_3")}
    assert opened.manifest["images"]["captions"] == "txt" and "captions" not in opened.manifest["teacher"]
    for split, step in (("train", 2.0**-11), ("validation", 0.0)):
        data = CachedImages(opened, split)
        for shard, reader in enumerate(data.shards):
            outputs = data.outputs([(shard, index) for index in range(COUNT)])
            for index, key in enumerate(reader.keys):
                own = texts_of(key)
                wanted_3D = encode([own[n % len(own)] for n in range(3)])
                for name, wanted_D in zip(("caption", "caption_2", "caption_3"), wanted_3D, strict=True):
                    gap_D = (outputs[name][index] - wanted_D).abs()
                    assert (gap_D <= wanted_D.abs() * step + 1e-5 * wanted_D.norm()).all()
                    assert not 0.9 < wanted_D.norm() < 1.1  # not normalised


def test_a_shard_that_is_written_again_has_the_same_bytes(made, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(made / "cache", folder)
    before = (folder / "00001.tar").read_bytes()
    for name in ("00001.tar", "00001.json"):
        (folder / name).unlink()
    cache.run(clips.load(made, "teacher.captions=3", f"cache.root={folder}"))
    assert (folder / "00001.tar").read_bytes() == before


def test_verify_recomputes_the_captions_and_names_one_that_has_changed_or_is_gone(made, tmp_path):
    assert cache.verify(clips.load(made, "teacher.captions=3"), samples=12)["largest_error"] < 0.01
    for name in ("00000", "00001", "v0"):
        shutil.copy(made / f"{name}.tar", tmp_path)
    shutil.copytree(made / "cache", tmp_path / "cache")
    settings = ["teacher.captions=3", f"cache.root={tmp_path}/cache"]
    clips.img2dataset(tmp_path, "00000", [])
    members = [(f"00000{n:04}.jpg", clips.picture(sum(map(ord, f"00000{n:04}")))) for n in range(COUNT)]
    clips.pack(tmp_path / "00000.tar", [m for n, i in members for m in ((n, i), (f"{n[:-3]}txt", b"another text"))])
    with pytest.raises(UserError, match=r"caption\w* of '00000000\d' differs from the teacher's"):
        cache.verify(clips.load(tmp_path, *settings), samples=99)
    clips.pack(tmp_path / "00000.tar", members)
    with pytest.raises(UserError, match=r"image '00000000\d' has no caption any more, but one was cached; restore it"):
        cache.verify(clips.load(tmp_path, *settings), samples=99)


def test_similarities_and_captions_lie_beside_tokens(tmp_path):
    for name in ("00000", "v0"):
        write(tmp_path, name)
    recipe = clips.load(tmp_path, *ONE, "teacher.tokens=true", "cache.similarity=true")
    cache.run(recipe)
    assert list(cache.open_cache(recipe).shapes) == sorted(["embedding", "tokens", "caption", "tokens_similarity"])
    assert cache.verify(recipe, samples=4)["largest_error"] < 0.5


def test_images_without_a_caption_are_counted_and_too_many_are_an_error_that_names_the_last(tmp_path, caplog):
    write(tmp_path, "00000", without=(0, 3))
    write(tmp_path, "v0")
    with caplog.at_level(logging.WARNING, logger="fmdistill"):
        cache.run(clips.load(tmp_path, *ONE, "cache.max_failed=0.5"))
    assert "00000: image '000000000' skipped: has no caption, and teacher.captions needs one" in caplog.text
    (reader,) = cache.open_cache(clips.load(tmp_path, *ONE)).shards["train"]
    assert reader.keys == [f"00000{n:04}" for n in (1, 2, 4, 5)]
    too_many = r"00000: .* gave no output, more than cache\.max_failed=0\.01; the last: '000000003' \(has no caption"
    with pytest.raises(UserError, match=too_many):
        cache.run(clips.load(tmp_path, *ONE, f"cache.root={tmp_path}/other"))


def refused(recipe, monkeypatch, says: str) -> None:
    """Check that caching is refused in one line, before a teacher is loaded."""
    with monkeypatch.context() as patch, pytest.raises(UserError, match=says) as error:
        patch.setattr(stage, "load_teacher", lambda recipe: pytest.fail("a teacher was loaded"))
        cache.run(recipe)
    assert "\n" not in str(error.value)


def test_a_source_without_captions_is_refused_before_a_teacher_is_loaded(tmp_path, monkeypatch):
    for name in ("00000", "v0"):
        clips.img2dataset(tmp_path, name, [f"{name}{n:04}" for n in range(3)], captions=False)
    refused(
        clips.load(tmp_path, *ONE),
        monkeypatch,
        r"teacher\.captions=1: image '000000000' of 00000 has no caption, nor have the 2 after it; .*captions=0",
    )
    write(tmp_path, "00000")
    columns = "images.columns={caption: null}"
    refused(clips.load(tmp_path, *ONE, columns), monkeypatch, "has no caption")


def test_a_cache_of_other_captions_is_refused_with_the_way_out(made, monkeypatch):
    again = r"outputs\.caption_3 is \{.*Go on with it by teacher\.captions=3; or choose another cache\.root=FOLDER"
    refused(clips.load(made, *ONE), monkeypatch, again)
    refused(clips.load(made, "teacher.captions=0"), monkeypatch, r"images\.captions is 'txt' there and None here")
    with pytest.raises(UserError, match=r"Go on with it by teacher\.captions=3"):
        cache.run(clips.load(made))  # a builder of another package has a default of its own


def test_a_live_teacher_and_a_negative_number_of_captions_are_refused():
    live = ["teacher.name=clip_mini", "teacher.captions=1", "cache=null", "teacher.live=true"]
    with pytest.raises(UserError, match=r"teacher\.captions=1: a live teacher sees images alone"):
        pipeline.check(clips.load(Path("/tmp"), *live))
    with pytest.raises(UserError, match=r"teacher\.captions=-1: expected 0 or more"):
        pipeline.check(clips.load(Path("/tmp"), "teacher.name=clip_mini", "teacher.captions=-1"))


def test_the_captions_column_is_part_of_the_identity_only_if_captions_are_cached():
    tar = {"name": "tar", "root": "/data", "columns": {"caption": "alt.txt"}}
    built = images.build(tar)
    assert built.identity() == images.build({**tar, "columns": {}}).identity()
    assert built.identity(captions=True) == {**built.identity(), "captions": "alt.txt"}
    mix = {"name": "mix", "sources": {"a": tar, "b": {"name": "captioned"}}}
    assert images.build(mix).identity(captions=True)["captions"] == {"a": "alt.txt", "b": "txt"}


def test_training_sees_one_caption_of_each_image_drawn_from_seed_epoch_and_key(made):
    recipe = clips.load(made, "teacher.captions=3", "seed=5")
    opened = provider.build(recipe)
    assert list(opened.outputs) == ["clip.caption", "clip.embedding"]
    data, places = opened.train, [(epoch, 0, index) for epoch in range(8) for index in range(COUNT)]
    chosen = []
    for order in (places, places[::-1]):
        drawn = {}
        for part in range(0, len(order), 8):
            batch = opened.complete(next(batches(data, [order[part : part + 8]], 0)))
            assert list(batch["outputs"]) == ["clip.embedding", "clip.caption"]
            rows = zip(order[part : part + 8], batch["keys"], batch["outputs"]["clip.caption"], strict=True)
            for place, key, row_D in rows:
                stored = CachedImages(cache.open_cache(recipe), "train").outputs([place[1:]])
                name = ("caption", "caption_2", "caption_3")[number(5, place[0], key, 3)]
                assert torch.equal(row_D, stored[name][0])
                drawn[place] = name
        chosen.append(drawn)
    assert chosen[0] == chosen[1] and len(set(chosen[0].values())) == 3
    assert [number(5, 0, f"{n}", 3) for n in range(3000)].count(1) in range(900, 1100)
    assert number(5, 0, "a", 1000) != number(5, 1, "a", 1000) != number(6, 1, "a", 1000)


def test_one_caption_is_not_drawn():
    outputs = {"clip.embedding": torch.ones(2, 3), "clip.caption": torch.zeros(2, 3)}
    assert captions.draw(outputs, "clip", [(0, 0, "a"), (0, 0, "b")]) == outputs


def test_a_cache_from_before_is_still_the_one_of_a_teacher_without_captions(tmp_path):
    for name in ("00000", "v0"):
        clips.img2dataset(tmp_path, name, [f"{name}{n:04}" for n in range(2)])
    cache.run(clips.load(tmp_path))
    stored = manifest.read(tmp_path / "cache")
    assert list(stored["outputs"]) == ["embedding"] and "captions" not in {**stored["images"], **stored["teacher"]}
    cache.run(clips.load(tmp_path, "teacher.captions=0"))
