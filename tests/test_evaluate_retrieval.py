"""Retrieval against a plain matrix of similarities: equal captions are right for each other, ties find nothing."""

import json
from pathlib import Path

import clip_run
import numpy as np
import pytest
import torch
from nondegenerate import randomize

from fmdistill import cache, evaluate, pipeline
from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate import retrieval, teacher_score
from fmdistill.evaluate.zeroshot import Zeroshot
from fmdistill.registry import UserError

CAPTIONS: list[str | None] = [
    f"a {noun} {place}" for noun in ("fox", "owl", "tram") for place in ("here", "there", "away")
]
CAPTIONS += ["a fox here", "a  fox\nhere", "", " \n", None]  # the first three are one caption, the last three none


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A folder with the cache and run of a toy CLIP whose validation tar has captions like CAPTIONS."""
    folder = tmp_path_factory.mktemp("retrieval")
    clip_run.write_teacher(folder / "teacher")
    clip_run.write_tar(folder / "train.tar", ["a fox"] * 3, seed=500)
    clip_run.write_tar(folder / "held.tar", CAPTIONS, labels=True)
    recipe = clip_run.load(folder, *tars(folder))
    cache.run(recipe)
    clip_run.finish(recipe, randomize(clip_run.Student(), 3))
    return folder


def tars(folder: Path) -> list[str]:
    names = ["images.name=tar", f"images.root={folder}"]
    return [*names, "images.train=[train.tar]", "images.validation=[held.tar]"]


def test_recalls_are_those_of_a_plain_loop(ran, caplog):
    caplog.set_level("INFO")
    metrics = evaluate.run("eval/clip_retrieval.yaml", ran / "run", ["trust=true", "workers=0", "batch=4"])
    assert "3 of 14 images have an empty caption and are left out" in caplog.text
    kept = json.loads((ran / "run/evaluation/clip_retrieval.json").read_text())
    assert (kept["empty"], kept["captions"]) == (3, 9)

    opened = cache.open_cache(clip_run.load(ran, *tars(ran)))
    data = CachedImages(opened, "validation")
    items = [data.item(0, 0, index) for index in range(14)]
    texts = [" ".join((caption or "").split()) for caption in CAPTIONS]
    names = list(dict.fromkeys(text for text in texts if text))
    by_key = {item["keys"]: item for item in items}
    order = [by_key[f"{number:05d}"] for number in range(14)]
    chosen = [number for number, text in enumerate(texts) if text]
    text = torch.nn.functional.normalize(opened.head().encode_text(names), dim=-1)
    image = torch.stack([order[number]["outputs"]["clip.embedding"] for number in chosen])
    cosine = (torch.nn.functional.normalize(image, dim=-1) @ text.T).numpy()
    own = [names.index(texts[number]) for number in chosen]
    for k in (1, 5):
        by_image = [own[i] in np.argsort(-cosine[i])[:k] for i in range(11)]
        by_text = [any(own[i] == u for i in np.argsort(-cosine[:, u])[:k]) for u in range(9)]
        assert metrics[f"teacher/text_retrieval@{k}"] == pytest.approx(np.mean(by_image))
        assert metrics[f"teacher/image_retrieval@{k}"] == pytest.approx(np.mean(by_text))
    assert "student/image_retrieval@10" in metrics and "student/text_retrieval@10" not in metrics  # of 11, of 9
    rows = [row for row in kept["rows"] if row["student"] == "teacher"]
    assert [row["key"] for row in rows] == [f"{number:05d}" for number in chosen]
    assert np.mean([row["text_rank"] <= 1 for row in rows]) == pytest.approx(metrics["teacher/text_retrieval@1"])


def test_perfect_embeddings_find_everything_and_equal_ones_nothing():
    own = torch.tensor([0, 1, 2, 0])
    text = torch.eye(3)
    image_ranks, text_ranks = retrieval.ranks(text[own], text, own)
    assert image_ranks.tolist() == [1, 1, 1] and text_ranks.tolist() == [1, 1, 1, 1]
    image_ranks, text_ranks = retrieval.ranks(torch.ones(4, 3), text, own)
    assert image_ranks.tolist() == [3, 4, 4] and text_ranks.tolist() == [3, 3, 3, 3]


def test_many_images_are_compared_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(23, 5, generator=generator), torch.randn(9, 5, generator=generator)
    own = torch.arange(23) % 9
    whole = retrieval.ranks(image, text, own)
    monkeypatch.setattr(retrieval, "CHUNK", 4)
    assert all(np.array_equal(a, b) for a, b in zip(whole, retrieval.ranks(image, text, own), strict=True))


def test_images_without_captions_are_one_clear_line(ran):
    clip_run.write_classes(ran / "val", 1)
    given = ["trust=true", "workers=0", "images.name=image_classes", f"images.root={ran}/val"]
    with pytest.raises(UserError, match="none of 6 images has a caption; it needs KEY.txt"):
        evaluate.run("eval/clip_retrieval.yaml", ran / "run", given)


def test_the_teacher_s_captions_and_labels_are_scored_before_training(ran, caplog):
    caplog.set_level("INFO")
    (ran / "names.txt").write_text("\n".join(sorted(clip_run.CLASSES)))
    others = evaluate.load("eval/imagenet_zeroshot.yaml").settings  # names of class folders, not of this tar
    found = teacher_score.judge_teacher(clip_run.load(ran, *tars(ran)), [others])
    assert found is not None and {"text_retrieval@1", "image_retrieval@1"} <= found.keys() and "top1" not in found
    assert "(recall@1, 11 images, 9 captions)" in caplog.text
    named = Zeroshot(classnames=str(ran / "names.txt"), templates=["a {}"], device="cpu")
    found = teacher_score.judge_teacher(clip_run.load(ran, *tars(ran)), [others, named])
    assert found is not None and {"text_retrieval@1", "top1"} <= found.keys() and "(14 images" in caplog.text


def test_a_run_scores_its_teacher_before_it_trains(ran, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "check_before", lambda settings: None)
    monkeypatch.setattr(pipeline.teacher_score, "judge_teacher", lambda *given: seen.append("teacher"))
    monkeypatch.setattr(pipeline.distill, "run", lambda settings: seen.append("train"))
    pipeline.run(clip_run.load(ran, *tars(ran)))
    assert seen == ["teacher", "train"]
