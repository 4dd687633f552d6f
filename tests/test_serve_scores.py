"""The page of CLIP runs: labels that a person types are scored by the teacher's text tower and each image tower."""

import io

import clip_run
import PIL.Image
import pytest
import torch
from served import answer, client, clip_folder
from torch.nn import functional as F

from fmdistill import cache, teachers
from fmdistill.backbones.clip import TextHead
from fmdistill.distill.student import load_student
from fmdistill.evaluate.subjects import embed
from fmdistill.recipe import load_saved
from fmdistill.registry import UserError
from fmdistill.serve import scores, subjects

LABELS, TEMPLATES = ["a red fox", "a tram"], ["a photo of {}", "{}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("serve")
    protocol = made / "zero.yaml"
    protocol.write_text(f"name: zeroshot\nclassnames: {made}/names.txt\ntemplates: ['one {{}}', 'two {{}}']\n")
    return clip_folder(made, f"protocols=[{protocol}]")


@pytest.fixture(scope="module")
def page(folder):
    return client([folder])


def embedded(page, image: dict) -> str:
    address = f"/api/images/{image['image']}"
    for name in ("teacher", "run"):
        answer(page.post(f"{address}/embedding", params={"subject": name}))
    return address


def test_scores_are_those_of_the_text_tower_and_each_embedding(page, folder):
    data = clip_run.picture(3)
    address = embedded(page, answer(page.post("/api/images", content=data)))
    made = answer(page.post(f"{address}/scores", json={"labels": [*LABELS, LABELS[0]], "templates": TEMPLATES}))
    assert made["labels"] == LABELS and [row["subject"] for row in made["scores"]] == ["teacher", "run"]
    opened = cache.open_cache(load_saved(folder, ["trust=true"]))
    head = TextHead.load(opened.root)
    texts = [F.normalize(head.encode_text([t.replace("{}", label) for t in TEMPLATES]), dim=1) for label in LABELS]
    text_KD = F.normalize(torch.stack([each.mean(0) for each in texts]), dim=1)
    pixels, size = opened.preprocess.prepare(PIL.Image.open(io.BytesIO(data)))
    sizes = torch.tensor([size])
    teacher = teachers.build(load_saved(folder, ["trust=true"]).teacher or {})
    embedding = {
        "teacher": teacher(pixels[None], sizes)["embedding"][0],
        "run": embed(load_student(folder, True), opened.preprocess, pixels[None], sizes)[0],
    }
    for row in made["scores"]:
        cosine = text_KD @ F.normalize(embedding[row["subject"]], dim=0)
        assert torch.allclose(torch.tensor(row["cosine"]), cosine, atol=1e-5)
        assert torch.allclose(torch.tensor(row["probability"]), torch.softmax(head.scale * cosine, 0), atol=1e-4)


def test_a_class_image_is_scored_from_the_cache_and_the_protocol_gives_the_words(page):
    session = answer(page.get("/api/session"))
    assert session["kind"] == "scores" and session["templates"] == ["one {}", "two {}"]
    own = [sample for sample in session["samples"] if sample["group"] == "validation"]
    assert {sample["label"] for sample in own} == set(clip_run.CLASSES.values())
    image = answer(page.post("/api/samples/0"))
    made = answer(page.post(f"/api/images/{image['image']}/embedding?subject=teacher"))
    assert made["milliseconds"] is None


WRONG = {
    "no labels": ({"labels": []}, "labels: expected 1 to 100 texts, got 0"),
    "many labels": ({"labels": ["a"] * 101}, "got 101"),
    "long": ({"labels": ["a" * 201]}, "at most 200"),
    "template": ({"labels": ["a"], "templates": ["no place"]}, "needs {} once"),
    "many templates": ({"labels": ["a"], "templates": ["{}"] * 9}, "1 to 8 texts"),
    "list": ([], "expected an object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words_are_a_message(page, name):
    words, reason = WRONG[name]
    address = embedded(page, answer(page.post("/api/images", content=clip_run.picture(1))))
    assert reason in answer(page.post(f"{address}/scores", json=words), 400)["error"]


def test_masks_and_weights_of_patches_are_refused(page):
    address = embedded(page, answer(page.post("/api/images", content=clip_run.picture(1))))
    assert "CLIP" in answer(page.post(f"{address}/masks", json={"points": [[0, 0, 1]]}), 400)["error"]
    assert "CLIP" in answer(page.get(f"{address}/weights"), 400)["error"]


def test_texts_are_embedded_once(folder, monkeypatch):
    texts = scores.TextEmbeddings(subjects.open_runs([folder], "cpu", trust=True))
    wording = scores.Wording(("a",), ("{}",))
    first = texts.of(wording)
    monkeypatch.setattr(scores, "classifier", None)
    assert texts.of(wording) is first


def test_a_classifiers_run_is_refused_with_what_can_be_served(folder, monkeypatch):
    monkeypatch.setattr(TextHead, "load", classmethod(lambda cls, root: object()))
    with pytest.raises(UserError, match="serve shows the masks of a SAM's students and the scores of a CLIP's"):
        subjects.open_runs([folder], "cpu", trust=True)
