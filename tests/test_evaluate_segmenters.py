"""Every subject of an evaluation has its embedding and head: from cache, live teacher, run or whole checkpoint."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sam_exports
import tiny
import torch
from segment_anything import SamPredictor
from torch import nn

import fmdistill
from fmdistill import cache, distill
from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate.segmenters import Segmenters, check
from fmdistill.export import mobilesam
from fmdistill.images import build
from fmdistill.mini.sam import PACKAGED
from fmdistill.predict.checkpoint_file import whole_sam
from fmdistill.registry import UserError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenters")
    loaded = tiny.load(folder, "train.steps=1", "teacher.exact=true")
    cache.run(loaded)
    distill.run(loaded)
    return loaded


def student(recipe):
    return distill.load_student(recipe.out, trust=True)


def test_cached_teacher_and_students_are_those_of_the_predictor(recipe):
    opened = Segmenters.open(recipe, {"student": student(recipe)})
    assert list(opened.subjects) == ["teacher", "student"] and len(opened.names) == 8
    data = CachedImages(cache.open_cache(recipe), "validation")
    predictors = {
        "teacher": SamPredictor(tiny.teacher(exact=True).sam),
        "student": fmdistill.load(recipe.out, trust=True),
    }
    for image in opened.images(opened.names[2:4]):
        pixels = data.cache.images.decode(image.encoded, image.shard)
        assert image.original == pixels.shape[:2] and image.name == f"{image.shard}/{image.key}"
        for name, segmenter in image.segmenters.items():
            predictors[name].set_image(pixels)
            torch.testing.assert_close(segmenter.embedding[None], predictors[name].features, atol=1e-5, rtol=1e-5)
            point, box = np.array([[20.3, 11.0]]), np.array([5.0, 4.0, 40.5, 30.0])
            expected = predictors[name].predict(point, np.array([1]), box, multimask_output=True, return_logits=True)
            logits, predicted = segmenter.decode(point[None], [[1]], box[None])
            torch.testing.assert_close(segmenter.upsample(logits)[0].numpy(), expected[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(predicted[0].numpy(), expected[1], atol=1e-4, rtol=1e-4)
            again = predictors[name].predict(point, np.array([0]), mask_input=expected[2][:1], return_logits=True)
            logits, _ = segmenter.decode(point[None], [[0]], masks=logits[:, :1])
            torch.testing.assert_close(segmenter.upsample(logits)[0].numpy(), again[0], atol=1e-4, rtol=1e-4)


def test_a_protocol_s_own_images_are_seen_whole_and_by_a_live_teacher_on_request(recipe, tmp_path):
    source = build({"name": "photos", "train": 3, "validation": 1, "size": 64})
    for shard in source.shards():
        for encoded in source.read(shard):
            (tmp_path / f"{encoded.key}.png").write_bytes(encoded.data)
    images = {"name": "folder", "root": str(tmp_path), "validation": 0}
    without = Segmenters.open(recipe, {"student": student(recipe)}, images)
    assert list(without.subjects) == ["student"] and len(without.names) == 4
    live = Segmenters.open(recipe, {"student": student(recipe)}, images, teacher=True)
    teacher = tiny.teacher(exact=True)
    for image, other in zip(live.images(), without.images(), strict=True):
        pixels, size = teacher.preprocess.prepare(build(images).decode(image.encoded, image.shard))
        expected = teacher(pixels[None], torch.tensor([size]))["embedding"][0]
        torch.testing.assert_close(image.segmenters["teacher"].embedding, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(image.segmenters["student"].embedding, other.segmenters["student"].embedding)


@pytest.mark.parametrize("kind", ["mobilesam", "sam_mini"])
def test_a_whole_checkpoint_needs_neither_cache_nor_teacher_and_uses_its_own_decoder(recipe, tmp_path, kind):
    lost = tiny.load(tmp_path)
    with pytest.raises(UserError, match="cache"):
        Segmenters.open(lost, {"student": student(recipe)})
    path = PACKAGED
    if kind == "mobilesam":
        path = tmp_path / "mobile_sam.pt"
        mobilesam.export(*sam_exports.mini(), path)
    opened = Segmenters.open(lost, {"student": whole_sam(path)})
    assert list(opened.subjects) == ["student"]
    predictor, image = fmdistill.load(path), next(opened.images())
    predictor.set_image(build(lost.images).decode(image.encoded, image.shard))
    expected = predictor.predict(np.array([[9.0, 30.5]]), np.array([1]), return_logits=True)
    logits, predicted = image.segmenters["student"].decode([[[9.0, 30.5]]], [[1]])
    difference = (image.segmenters["student"].upsample(logits)[0] - torch.from_numpy(expected[0])).abs().max()
    assert difference < 1e-3 * np.abs(expected[0]).max()
    torch.testing.assert_close(predicted[0].numpy(), expected[1], atol=1e-4, rtol=1e-4)


def test_a_student_without_a_decoder_is_no_whole_checkpoint(recipe):
    assert whole_sam(Path(recipe.out) / "student.safetensors") is None


def test_two_subjects_of_other_sizes_see_the_same_image(recipe):
    opened = Segmenters.open(recipe, {"student": student(recipe), "whole": whole_sam(PACKAGED)})
    image = next(opened.images())
    assert [max(each.resized) for each in image.segmenters.values()] == [64, 64, 256]
    assert len({each.original for each in image.segmenters.values()}) == 1


def test_what_cannot_make_masks_is_refused_before_work(recipe):
    check("prompted_miou", recipe, teacher=True)
    with pytest.raises(UserError, match="prompted_miou: judges the masks of SAMs; teacher.name=clip_mini is none"):
        check("prompted_miou", replace(recipe, teacher={"name": "clip_mini"}))
    alone = replace(recipe, teacher=None, cache=None, student={"name": "tinyvit_sam"})
    with pytest.raises(UserError, match="student.name=tinyvit_sam without a teacher"):
        check("prompted_miou", alone)
    with pytest.raises(UserError, match="teacher=true"):
        check("prompted_miou", replace(alone, student={"name": "sam_mini"}), teacher=True)
    wide = nn.Sequential(nn.Conv2d(3, 64, 16, 16))
    wide.forward = lambda image: {"embedding": wide[0](image)}
    with pytest.raises(
        UserError, match=r"student: gives an embedding of \(64, 4, 4\), but its head takes \(32, 4, 4\)"
    ):
        next(Segmenters.open(recipe, {"student": wide}).images())
