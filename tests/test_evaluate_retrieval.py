"""Retrieval against a plain matrix of similarities: equal captions are correct for each other, ties count as errors."""

import json
from pathlib import Path

import clip_run
import numpy as np
import pytest
import tiny
import torch
from nondegenerate import randomize

from fmdistill import cache, evaluate, pipeline
from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate import retrieval, teacher_score
from fmdistill.evaluate.results import value
from fmdistill.evaluate.zeroshot import Zeroshot
from fmdistill.registry import UserError

CAPTIONS: list[str | None] = [
    f"a {noun} {place}" for noun in ("fox", "owl", "tram") for place in ("here", "there", "away")
]
# one caption in other white space, one of three lines with two captions of which one is another image's, and none
CAPTIONS += ["a fox here", "a  fox  here\r\n", "a owl away\n\na red cat\na owl  away", "", " \n", None]


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


def own_captions(caption: str | None) -> list[str]:
    return [" ".join(line.split()) for line in (caption or "").splitlines() if line.strip()]


def test_recalls_are_those_of_a_plain_loop(ran, caplog):
    caplog.set_level("INFO")
    rows = evaluate.run("eval/clip_retrieval.yaml", ran / "run", ["trust=true", "workers=0", "batch=4"])
    assert "3 of 15 images have no caption and are left out" in caplog.text
    stored = json.loads((ran / "run/evaluation/clip_retrieval.json").read_text())
    assert (stored["empty"], stored["captions"]) == (3, 10)

    opened = cache.open_cache(clip_run.load(ran, *tars(ran)))
    data = CachedImages(opened, "validation")
    items = [tiny.item(data, 0, index) for index in range(15)]
    texts = [own_captions(caption) for caption in CAPTIONS]
    names = list(dict.fromkeys(text for own in texts for text in own))
    by_key = {item["keys"]: item for item in items}
    order = [by_key[f"{number:05d}"] for number in range(15)]
    chosen = [number for number, own in enumerate(texts) if own]
    text = torch.nn.functional.normalize(opened.head().encode_text(names), dim=-1)
    image = torch.stack([order[number]["outputs"]["clip.embedding"] for number in chosen])
    cosine = (torch.nn.functional.normalize(image, dim=-1) @ text.T).numpy()
    own = [{names.index(text) for text in texts[number]} for number in chosen]
    assert sorted(map(len, own)) == [1] * 11 + [2]
    for k in (1, 5, 10):
        by_image = [bool(own[i] & set(np.argsort(-cosine[i])[:k])) for i in range(12)]
        by_text = [any(u in own[i] for i in np.argsort(-cosine[:, u])[:k]) for u in range(10)]
        assert value(rows, "text_retrieval", "teacher", k=k) == pytest.approx(np.mean(by_image))
        assert value(rows, "image_retrieval", "teacher", k=k) == pytest.approx(np.mean(by_text))
    assert {(row["metric"], row["count"]) for row in rows} == {("text_retrieval", 12), ("image_retrieval", 10)}
    images = [image for image in stored["images"] if image["subject"] == "teacher"]
    assert [image["key"] for image in images] == [f"{number:05d}" for number in chosen]
    assert [set(image["captions"]) for image in images] == [set(texts[number]) for number in chosen]
    first = np.mean([image["text_rank"] <= 1 for image in images])
    assert first == pytest.approx(value(rows, "text_retrieval", "teacher", k=1))


def pairs(own: list[list[int]]) -> torch.Tensor:
    return torch.tensor([(image, caption) for image, captions in enumerate(own) for caption in captions])


def test_perfect_embeddings_retrieve_everything_and_equal_or_undefined_ones_nothing():
    own = pairs([[0], [1], [2], [0]])
    text = torch.eye(3)
    image_ranks, text_ranks = retrieval.ranks(text[own[:, 1]], text, own)
    assert image_ranks.tolist() == [1, 1, 1] and text_ranks.tolist() == [1, 1, 1, 1]
    for image in (torch.ones(4, 3), torch.full((4, 3), torch.nan)):
        image_ranks, text_ranks = retrieval.ranks(image, text, own)
        assert image_ranks.tolist() == [3, 4, 4] and text_ranks.tolist() == [3, 3, 3, 3]


def test_of_several_captions_the_best_counts_and_the_others_are_no_errors():
    own = [[0, 1], [1, 2, 3], [4], [0, 4]]
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(4, 6, generator=generator), torch.randn(5, 6, generator=generator)
    cosine = (image @ text.T).numpy()
    image_ranks, text_ranks = retrieval.ranks(image, text, pairs(own))
    for n in range(4):
        best = max(cosine[n, u] for u in own[n])
        assert text_ranks[n] == 1 + sum(cosine[n, u] >= best for u in range(5) if u not in own[n])
    for u in range(5):
        best = max(cosine[n, u] for n in range(4) if u in own[n])
        assert image_ranks[u] == 1 + sum(cosine[n, u] >= best for n in range(4) if u not in own[n])
    assert sorted(text_ranks)[-1] > 1 and sorted(image_ranks)[-1] > 1


def test_many_images_are_compared_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(23, 5, generator=generator), torch.randn(9, 5, generator=generator)
    own = pairs([[number % 9, (number + number % 3) % 9] for number in range(23)])
    whole = retrieval.ranks(image, text, own)
    monkeypatch.setattr(retrieval, "CHUNK", 4)
    assert all(np.array_equal(a, b) for a, b in zip(whole, retrieval.ranks(image, text, own), strict=True))


def test_images_without_captions_are_a_one_line_error(ran):
    clip_run.write_classes(ran / "val", 1)
    overrides = ["trust=true", "workers=0", "images.name=image_classes", f"images.root={ran}/val"]
    with pytest.raises(UserError, match="none of 6 images has a caption; it needs KEY.txt"):
        evaluate.run("eval/clip_retrieval.yaml", ran / "run", overrides)


def test_the_teacher_s_captions_and_labels_are_scored_before_training(ran, caplog):
    caplog.set_level("INFO")
    (ran / "names.txt").write_text("\n".join(sorted(clip_run.CLASSES)))
    others = evaluate.load("eval/imagenet_zeroshot.yaml").evaluator  # names of class folders, not of this tar
    rows = teacher_score.judge_teacher(clip_run.load(ran, *tars(ran)), [others])
    assert {row["metric"] for row in rows} == {"text_retrieval", "image_retrieval"}
    assert "(recall@1, 12 images, 10 captions)" in caplog.text
    named = Zeroshot(classnames=str(ran / "names.txt"), templates=["a {}"], device="cpu")
    rows = teacher_score.judge_teacher(clip_run.load(ran, *tars(ran)), [others, named])
    assert {"text_retrieval", "top1"} <= {row["metric"] for row in rows} and "(15 images" in caplog.text


def test_a_run_scores_its_teacher_before_it_trains(ran, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "check_before", lambda settings: None)
    monkeypatch.setattr(pipeline.teacher_score, "judge_teacher", lambda *arguments: seen.append("teacher"))
    monkeypatch.setattr(pipeline.distill, "run", lambda settings: seen.append("train"))
    pipeline.run(clip_run.load(ran, *tars(ran)))
    assert seen == ["teacher", "train"]
