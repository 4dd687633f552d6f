"""SRW's similarities kept beside a map: the pairwise formula, the weights that they give, and who must not use them."""

import dataclasses
import json
import math

import clips
import numpy as np
import pytest
import tiny
import torch
import webdataset

from fmdistill import cache, distill, pipeline
from fmdistill.cache import similarity
from fmdistill.cache.dataset import CachedImages
from fmdistill.cache.footprint import tar_bytes
from fmdistill.distill.loader import batches
from fmdistill.distill.rectifiers.rewrite import replace_teacher_output
from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.srw import SRW
from fmdistill.distill.weightings.sum_normalizer import SumNormalizer
from fmdistill.registry import UserError
from fmdistill.teachers.output import Output

KEPT = ("cache.similarity=true", "objective.embedding.padding=exclude")
SMALL = ("images.train=8", "images.validation=2")
LOSSY = ("cache.codec=int4", "cache.trim=true")
NAME, MAP = "sam.embedding", "sam.embedding_similarity"
ROUNDING = 2.0**-12  # of a float16 of at most 1


def pairwise(feature_CN: np.ndarray, valid_N: np.ndarray) -> np.ndarray:
    unit_CN = feature_CN.astype(np.float64) / np.linalg.norm(feature_CN.astype(np.float64), axis=0)
    return (unit_CN.T @ unit_CN)[:, valid_N].mean(1)


def images(folder, *settings: str, split: str = "train") -> CachedImages:
    folder.mkdir()
    recipe = tiny.load(folder, *KEPT, *SMALL, *settings)
    cache.run(recipe)
    return CachedImages(cache.open_cache(recipe), split)


def seen(data: CachedImages, padding: str) -> Seen:
    """What an objective sees of the first shard's images, read as a loader reads them."""
    places = [(0, 0, index) for index in range(data.counts[0])]
    batch = data.decode(next(batches(data, [places], 0)))
    grids = {NAME: data.cache.preprocess.valid(batch["sizes"]).flatten(1)}
    similarity = {NAME: batch["outputs"].pop(MAP)}
    return Seen(batch["outputs"], grids=grids, similarity=similarity).focus("embedding", padding)


def computed(before: Seen) -> Seen:
    return dataclasses.replace(before, similarity={})


def entries(of: Seen) -> torch.Tensor:
    return torch.zeros(len(of.outputs[NAME]), 16)


@pytest.mark.parametrize("settings", [("cache.codec=fp32",), LOSSY])
def test_both_maps_are_the_pairwise_cosines_of_the_teachers_own_map_in_any_codec(tmp_path, settings):
    for split in ("train", "validation"):
        data = images(tmp_path / split, *settings, split=split)
        model = tiny.teacher()
        for index in range(data.counts[0]):
            item = tiny.item(data, 0, index)
            feature_CN = model(item["pixels"][None], item["sizes"][None])["embedding"][0].flatten(1).numpy()
            valid_N = data.cache.preprocess.valid(item["sizes"][None]).flatten().numpy()
            every_N, unpadded_N = item["outputs"][MAP].flatten(1).numpy()
            assert np.abs(every_N - pairwise(feature_CN, np.ones(16, bool))).max() < 1.01 * ROUNDING
            assert np.abs(unpadded_N - pairwise(feature_CN, valid_N) * valid_N).max() < 1.01 * ROUNDING
            assert not valid_N.all() or np.array_equal(every_N, unpadded_N)
            assert "shape" not in data.shards[0].samples[index]["outputs"]["embedding_similarity"]
        assert data.cache.shapes["embedding_similarity"] == (2, 4, 4)
        stored = next(iter(webdataset.WebDataset(str(data.shards[0].path), shardshuffle=False).decode()))
        plain = stored["embedding_similarity.npy"]
        assert plain.dtype == np.float16 and plain.shape == (2, 4, 4)
        assert np.array_equal(plain, tiny.item(data, 0, 0)["outputs"][MAP].numpy())


@pytest.mark.parametrize("padding", ["include", "exclude"])
def test_weights_of_an_exact_cache_are_the_computed_ones_within_float16_s_rounding(tmp_path, padding):
    """Numerator and mean are off by exp(2^-12 / temperature) at most, so the weight by that squared."""
    kept = seen(images(tmp_path / "cache", "cache.codec=fp32"), padding)
    assert kept.valid is not None and kept.valid.all() == (padding == "include")
    for settings in ({"temperature": 0.5}, {"temperature": 0.02}, {"temperature": 0.1, "reverse": True}):
        found, expected = (SRW(**settings)(entries(kept), one) for one in (kept, computed(kept)))
        bound = math.expm1(2.02 * ROUNDING / settings["temperature"])
        assert not torch.equal(found, expected) and torch.equal(found > 0, kept.valid)
        assert ((found - expected).abs() <= bound * expected).all()
    for weigh in (SRW(relative=True), SumNormalizer()):
        found, expected = (weigh(entries(kept), one) for one in (kept, computed(kept)))
        assert not torch.equal(found, expected) and torch.allclose(found, expected, atol=0.05)


def test_kept_similarities_give_a_lossy_trimmed_cache_the_weights_of_the_exact_one(tmp_path):
    exact = seen(images(tmp_path / "exact", "cache.codec=fp32"), "exclude")
    lossy = seen(images(tmp_path / "lossy", *LOSSY), "exclude")
    weigh = SRW(temperature=0.5)
    right = weigh(entries(exact), computed(exact))
    ours, theirs = ((weigh(entries(lossy), one) - right).abs().max() for one in (lossy, computed(lossy)))
    assert ours <= 2.1 * ROUNDING / 0.5 * right.max() and ours < theirs / 3


def test_they_serve_the_group_image_of_their_own_map_alone(tmp_path):
    kept = seen(images(tmp_path / "cache"), "exclude")
    drawn = torch.rand(kept.similarity[NAME].shape, generator=torch.Generator().manual_seed(0))
    planted = dataclasses.replace(kept, similarity={NAME: drawn})
    for weigh in (SRW(), SRW(group="image"), SRW(feature=NAME), SumNormalizer()):
        assert (weigh(entries(kept), planted) - weigh(entries(kept), kept)).abs().max() > 0.1
    assert torch.equal(SRW(group="batch")(entries(kept), planted), SRW(group="batch")(entries(kept), kept))
    other = dataclasses.replace(planted, outputs={**planted.outputs, "t.other": kept.outputs[NAME]})
    assert torch.equal(SRW(feature="t.other")(entries(kept), other), SRW()(entries(kept), computed(kept)))
    rectified = replace_teacher_output(planted, kept.outputs[NAME])
    assert torch.equal(SRW()(entries(kept), rectified), SRW()(entries(kept), computed(kept)))


def test_patches_that_rounding_alone_parts_are_alike():
    tie = 0.75 + similarity.STEP / 2
    plane = torch.tensor([[tie - 1e-6, tie + 1e-6], [tie, tie]]).half().float()
    assert float(plane.max() - plane.min()) == similarity.STEP
    valid, feature = torch.ones(1, 4, dtype=torch.bool), torch.randn(1, 3, 2, 2)
    alike = Seen({NAME: feature}, valid, "embedding", similarity={NAME: plane.expand(1, 2, 2, 2)})
    for weigh in (SRW(temperature=0.1, relative=True), SRW(temperature=1e-3), SumNormalizer()):
        assert torch.equal(weigh(torch.zeros(1, 4), alike), torch.ones(1, 4))


def test_a_student_learns_by_them_within_their_rounding_and_the_cache_is_verified(tmp_path):
    losses = []
    for kept in ("true", "false"):
        (tmp_path / kept).mkdir()
        recipe = tiny.load(
            tmp_path / kept, *KEPT, *SMALL, "cache.codec=fp32", f"cache.similarity={kept}", "train.steps=2"
        )
        pipeline.check(recipe)
        cache.run(recipe)
        lines = (distill.run(recipe) / "metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[0])["loss"])
        shard = cache.open_cache(recipe).shards["train"][0]
        assert tar_bytes(shard.codecs, shard.outputs, 8) == shard.path.stat().st_size
        assert cache.verify(recipe, samples=4)["samples"] == 4
    assert losses[0] != losses[1] and abs(losses[0] / losses[1] - 1) < 2.02 * ROUNDING / 0.5


def test_a_cache_with_and_one_without_are_told_apart_with_the_way_back(tmp_path):
    recipes = {kept: tiny.load(tmp_path, *SMALL, f"cache.similarity={kept}") for kept in ("true", "false")}
    for first, second in (("true", "false"), ("false", "true")):
        cache.run(recipes[first])
        says = rf"outputs\.embedding_similarity is .*Go on with it by cache\.similarity={first};"
        with pytest.raises(UserError, match=says):
            cache.run(recipes[second])
        for path in (tmp_path / "cache").iterdir():
            path.unlink()


def taken() -> tiny.SamTeacher:
    made = tiny.teacher()
    made.outputs = {**made.outputs, "embedding_similarity": Output((2, 4, 4), "all")}
    return made


def test_where_there_is_no_map_or_the_name_is_taken_it_is_refused(tmp_path):
    classifier = ("classifier", "teacher.network.name=resnet20", "teacher.weights=x")
    for (name, *more), maps in ((classifier, "maps=[stage3]"), (("clip_mini",), "tokens=true")):
        settings = (*KEPT, f"teacher.name={name}", *more)
        says = rf"cache\.similarity=true: teacher\.name={name} makes no map.*by teacher\.{maps.partition('=')[0]}"
        with pytest.raises(UserError, match=says):
            pipeline.check(tiny.load(tmp_path, *settings))
        pipeline.check(tiny.load(tmp_path, *settings, f"teacher.{maps}"))
    with pytest.raises(UserError, match=r"cache\.similarity=true: ClipTeacher makes no map"):
        cache.load_teacher(tiny.load(tmp_path, *KEPT, "teacher.name=clips:teacher"))
    with pytest.raises(
        UserError, match=r"'embedding_similarity' is named as those of cache\.similarity are; rename it"
    ):
        cache.load_teacher(tiny.load(tmp_path, *KEPT, "teacher.name=test_cache_similarity:taken"))


def test_clip_s_patch_tokens_have_them_and_its_vectors_do_not():
    model = similarity.WithSimilarity(clips.teacher(tokens=True))
    similar = Output((2, 4, 4), "all", of="tokens")
    tokens = Output((32, 4, 4), "all")
    assert model.outputs == {"embedding": Output((24,)), "tokens": tokens, "tokens_similarity": similar}
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = model(pixels, torch.full((2, 2), 32))
    assert {n: tuple(value.shape[1:]) for n, value in found.items()} == {n: o.shape for n, o in model.outputs.items()}
    for tokens, (every, unpadded) in zip(found["tokens"], found["tokens_similarity"], strict=True):
        expected = pairwise(tokens.flatten(1).numpy(), np.ones(16, bool))
        assert np.allclose(every.flatten(), expected, atol=1e-6) and torch.equal(every, unpadded)
