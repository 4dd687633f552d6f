"""k-nearest-neighbour top-1 against a brute-force loop in float64, and on class folders from cache to rows."""

import json
import math
from collections import defaultdict
from pathlib import Path

import clip_run
import numpy as np
import pytest
import tiny
import torch
from nondegenerate import randomize

from fmdistill import cache, distill, evaluate, report
from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate import knn
from fmdistill.evaluate.knn import Knn, nearest, predict
from fmdistill.evaluate.results import value
from fmdistill.registry import UserError

EACH, HELD = 5, 3  # images of each of the six classes


def brute_force(bank, labels, query, k: int, temperature: float) -> int:
    """Return the class of one query by Python's own sort: similarity first, then the place in the bank."""

    def unit(vector):
        length = math.sqrt(sum(float(v) ** 2 for v in vector))
        return [float(v) / length for v in vector]

    q = unit(query)
    similarity = [sum(a * b for a, b in zip(unit(vector), q, strict=True)) for vector in bank]
    order = sorted(range(len(bank)), key=lambda i: (-similarity[i], i))[:k]
    votes: dict[int, float] = defaultdict(float)
    for i in order:
        votes[int(labels[i])] += math.exp(similarity[i] / temperature)
    return min(votes, key=lambda label: (-votes[label], label))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_predictions_are_those_of_a_brute_force_loop(temperature, monkeypatch):
    rng = np.random.default_rng(0)
    bank, query = 1 + rng.normal(size=(60, 5)), 1 + rng.normal(size=(40, 5))
    labels = rng.choice([3, 7, 8, 2_000_000_000], size=60)
    ks = [1, 3, 10, 60]
    expected = np.array([[brute_force(bank, labels, q, k, temperature) for k in ks] for q in query])
    assert len({tuple(column) for column in expected.T.tolist()}) >= 3, "the numbers of neighbours make no difference"
    predicted = predict(torch.tensor(bank).float(), labels, torch.tensor(query).float(), ks, temperature)
    assert (predicted == expected).all()
    monkeypatch.setattr(knn, "ELEMENTS", 7 * 60)  # in pieces of seven queries
    assert (
        predict(torch.tensor(bank).float(), labels, torch.tensor(query).float(), ks, temperature) == predicted
    ).all()
    uniform = np.array([[brute_force(bank, labels, q, k, 1e6) for k in ks] for q in query])
    assert (uniform != expected).any(), "the weights of the votes make no difference"


def test_of_equal_similarities_the_first_is_nearer_and_of_equal_votes_the_smaller_label_wins():
    cosine = torch.tensor([[0.5, 1.0, 0.5, 0.5, 1.0, 0.25], [0.0] * 6, [1, 2, 3, 4, 5, 6]])
    for k in range(1, 7):
        expected = [sorted(range(6), key=lambda i: (-row[i], i))[:k] for row in cosine.tolist()]
        assert nearest(cosine, k).tolist() == expected
    bank = torch.eye(2).repeat(3, 1)  # copies of two directions, in turn
    labels = np.array([9, 4, 1, 4, 1, 4])
    query = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    predicted = predict(bank, labels, query, [1, 2, 3, 6], 0.07)
    assert predicted[0].tolist() == [9, 1, 1, 1]  # of the votes 9 and 1 are equal at k = 2
    assert predicted[1].tolist() == [9, 4, 1, 4]  # all similarities are equal, so the bank is taken in order


def test_nearest_equals_a_stable_sort_where_values_repeat():
    cosine = torch.randint(0, 4, (200, 31), generator=torch.Generator().manual_seed(0)).float()
    whole = cosine.argsort(dim=1, descending=True, stable=True)
    for k in (1, 5, 30, 31):
        assert torch.equal(nearest(cosine, k), whole[:, :k])


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A folder with the cache and run of a toy CLIP on class folders, of which training and validation differ."""
    folder = tmp_path_factory.mktemp("knn")
    clip_run.write_teacher(folder / "teacher")
    clip_run.write_classes(folder / "train", EACH)
    clip_run.write_classes(folder / "val", HELD, seed=50)
    recipe = clip_run.load(folder)
    cache.run(recipe)
    clip_run.finish(recipe, randomize(clip_run.Student(), 3))
    (folder / "knn.yaml").write_text("name: knn\nks: [1, 3, 10, 200]\nbatch: 4\nworkers: 0\n")
    return folder


def judged(folder: Path, *overrides: str) -> list[dict]:
    return evaluate.run(folder / "knn.yaml", folder / "run", ["trust=true", *overrides])


def features(folder: Path, split: str) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
    """Return keys, labels and the features of teacher and student, image by image."""
    opened = cache.open_cache(clip_run.load(folder))
    student = distill.load_student(folder / "run", trust=True)
    data = CachedImages(opened, split)
    items = [tiny.item(data, s, i) for s, shard in enumerate(data.shards) for i in range(len(shard.samples))]
    with torch.no_grad():
        outputs = [
            student(opened.preprocess.normalize(i["pixels"][None], i["sizes"][None]))["embedding"][0] for i in items
        ]
    teacher = np.stack([item["outputs"]["clip.embedding"].numpy() for item in items])
    names = sorted(clip_run.CLASSES)
    labels = np.array([names.index(item["keys"].partition("/")[0]) for item in items])
    return [item["keys"] for item in items], labels, {"teacher": teacher, "student": torch.stack(outputs).numpy()}


def test_a_run_s_rows_are_those_of_a_loop_over_its_images(ran):
    rows = judged(ran)
    stored = json.loads((ran / "run/evaluation/knn.json").read_text())
    assert stored["rows"] == rows and stored["bank"] == 6 * EACH
    bank_keys, bank_labels, bank = features(ran, "train")
    keys, labels, query = features(ran, "validation")
    assert len(set(bank_keys) | set(keys)) >= 6 * EACH
    images = {(image["key"], image["subject"]): image for image in stored["images"]}
    for subject in ("student", "teacher"):
        for k in (1, 3, 10):
            expected = [brute_force(bank[subject], bank_labels, q, k, 0.07) for q in query[subject]]
            assert [images[key, subject]["predictions"][str(k)] for key in keys] == expected
            assert value(rows, "top1", subject, k=k) == pytest.approx(np.mean(expected == labels))
        assert [images[key, subject]["label"] for key in keys] == labels.tolist()
    assert {row.get("k") for row in rows} == {1, 3, 10}, "200 neighbours of a bank of 30"
    assert {row["count"] for row in rows} == {6 * HELD}
    assert value(rows, "top1", "majority class", k=1) == pytest.approx(1 / 6)
    assert value(rows, "top1", k=1) != value(rows, "top1", "teacher", k=1), "the two subjects have the same score"
    text = report.text([str(ran / "run")])
    assert "k-NN top-1" in text and "majority class" in text and "Share of the way" in text


def test_other_class_folders_have_no_teacher_and_give_the_student_the_same_rows(ran):
    cached = judged(ran)
    roots = [f"images.root={ran}/train", f"images.validation_root={ran}/val"]
    rows = judged(ran, "images.name=image_classes", *roots)
    assert {row["subject"] for row in rows} == {"student", "majority class"}
    assert [row for row in rows if row["subject"] == "student"] == [
        row for row in cached if row["subject"] == "student"
    ]
    fewer = judged(ran, "images.name=image_classes", *roots, "bank=7", "limit=4")
    assert {row["count"] for row in fewer} == {4} and {row["k"] for row in fewer} == {1, 3}


def test_more_training_images_make_another_result(ran, monkeypatch):
    roots = ["images.name=image_classes", f"images.root={ran}/other", f"images.validation_root={ran}/val"]
    clip_run.write_classes(ran / "other", 1, seed=90)
    judged(ran, *roots)
    calls, call = [], evaluate._call
    monkeypatch.setattr(evaluate, "_call", lambda *given: calls.append(1) or call(*given))
    judged(ran, *roots)
    assert not calls
    (ran / "other/e_sky/more.png").write_bytes(clip_run.picture(7))
    judged(ran, *roots)
    assert len(calls) == 1


def test_what_cannot_be_judged_is_a_one_line_error(ran):
    recipe = clip_run.load(ran)
    for settings, message in (
        ({"ks": ()}, "ks="), ({"ks": (3, 3)}, "ks="), ({"ks": (0,)}, "ks="), ({"temperature": 0.0}, "temperature=0.0"),
        ({"bank": 0}, "bank=0"), ({"limit": 0}, "limit=0"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Knn(**settings)
    with pytest.raises(UserError, match="ks=.*the bank has 30 images"):
        Knn(ks=(50,), workers=0).judge(recipe, {"student": clip_run.Student().eval()})
    with pytest.raises(UserError, match="output=embeding: .*Did you mean 'embedding'"):
        Knn(output="embeding").judge(recipe, {"student": clip_run.Student().eval()})
    with pytest.raises(UserError, match="this recipe has no cache"):
        Knn().check(clip_run.load(ran, "cache=null"))
    clip_run.write_tar(ran / "a.tar", ["x"] * 2, labels=True)
    clip_run.write_tar(ran / "b.tar", ["x"] * 2)
    tars = {"name": "tar", "root": str(ran), "train": ["a.tar"], "validation": ["b.tar"]}
    with pytest.raises(UserError, match="knn: image '00000' has no label; use a source"):
        Knn(images=tars).check_images(recipe)
    with pytest.raises(UserError, match="knn: there are no training images"):
        Knn(images={"name": "image_classes", "root": str(ran / "val")}).check_images(recipe)


class Broken(clip_run.Student):
    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": super().forward(image)["embedding"] / 0}


def test_features_that_are_not_finite_are_an_error(ran):
    with pytest.raises(UserError, match="student gives image '.*' an embedding that is not finite"):
        Knn(workers=0).judge(clip_run.load(ran), {"student": Broken().eval()})
