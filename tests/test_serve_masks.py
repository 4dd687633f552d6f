"""The page of SAM runs: images are embedded once, and masks are the decoder's on each network's embedding."""

import io
import json
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from served import answer, client, mask, sam_runs
from torch.nn import functional as F

from fmdistill import cache
from fmdistill.backbones.promptable import PromptHead
from fmdistill.distill.student import load_student
from fmdistill.evaluate.subjects import embed
from fmdistill.images import Decoding
from fmdistill.mini.photos import photograph
from fmdistill.recipe import load_saved
from fmdistill.registry import UserError
from fmdistill.serve import app, masks, pictures, samples, subjects


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return sam_runs(tmp_path_factory.mktemp("serve"), "one", "two")


@pytest.fixture(scope="module")
def page(folders):
    return client(folders)


def encoded(name="coffee", suffix="PNG", size=(300, 200)) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(photograph(name)).resize(size).save(file, suffix)
    return file.getvalue()


def upload(page, data: bytes, **headers) -> dict:
    return answer(page.post("/api/images?name=mine.png", content=data, headers=headers))


def embed_all(page, image: dict) -> dict:
    address = f"/api/images/{image['image']}/embedding"
    return {name: answer(page.post(address, params={"subject": name})) for name in ("teacher", "one", "two")}


def predict(page, image: dict, **prompt) -> dict:
    return answer(page.post(f"/api/images/{image['image']}/masks", json=prompt))


def decoded(folders, data: bytes, points, labels, box, number):
    """Return the teacher's and both students' masks by the head's own decode, bool (H, W), and their predicted IoU."""
    recipe = load_saved(folders[0], ["trust=true"])
    opened, teacher = cache.open_cache(recipe), tiny.teacher()
    picture = np.array(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
    pixels, (h, w) = opened.preprocess.prepare(picture)
    sizes, shown = torch.tensor([[h, w]]), (683, 1024)
    embeddings = {"teacher": teacher(pixels[None], sizes)["embedding"][0]}
    for name, folder in zip(("one", "two"), folders, strict=True):
        embeddings[name] = embed(load_student(folder, True), opened.preprocess, pixels[None], sizes)[0]
    head = PromptHead.load(opened.root)
    scale = torch.tensor([w, h])
    xy = None if points is None else torch.tensor([points]) * scale
    corners = None if box is None else torch.tensor([box]) * scale.repeat(2)
    made = {}
    for name, embedding in embeddings.items():
        with torch.no_grad():
            given = None if labels is None else torch.tensor([labels])
            logits, predicted = head.decode(embedding, xy, given, corners, multimask=number != 0)
        index = 0 if number == 0 else int(predicted[0].argmax()) if number is None else number - 1
        low = F.interpolate(logits[:, index : index + 1], (64, 64), mode="bilinear")[..., :h, :w]
        made[name] = F.interpolate(low, shown, mode="bilinear")[0, 0] > 0, float(predicted[0, index])
    return made


PROMPTS = {
    "point": ([[0.4, 0.6]], [1], None, None),
    "negative": ([[0.4, 0.6], [0.8, 0.1]], [1, 0], None, 0),
    "box": (None, None, [0.2, 0.1, 0.7, 0.9], 0),
    "point and box": ([[0.3, 0.3]], [1], [0.2, 0.1, 0.7, 0.9], 0),
    "second mask": ([[0.4, 0.6]], [1], None, 2),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_masks_and_iou_are_those_of_the_head_on_each_embedding(page, folders, name):
    points, labels, box, number = PROMPTS[name]
    data = encoded()
    image = upload(page, data)
    assert image["original"] == [200, 300] and image["shown"] == [683, 1024]
    embed_all(page, image)
    rows = [[*xy, label] for xy, label in zip(points or [], labels or [], strict=True)]
    made = predict(page, image, points=rows, box=box, mask="2" if number == 2 else "auto")
    expected = decoded(folders, data, points, labels, box, number)
    assert made["size"] == [683, 1024] and [each["subject"] for each in made["masks"]] == ["teacher", "one", "two"]
    teacher = expected["teacher"][0]
    for entry in made["masks"]:
        shown, (wanted, predicted) = mask(entry, made["size"]), expected[entry["subject"]]
        assert (shown != wanted).float().mean() < 1e-4
        assert entry["predicted"] == pytest.approx(predicted, abs=1e-3)
        union = (wanted | teacher).sum()
        assert entry["iou"] == pytest.approx(float((wanted & teacher).sum() / union) if union else 1.0, abs=1e-3)
    shares = [float(mask(entry, made["size"]).float().mean()) for entry in made["masks"]]
    assert any(0 < share < 1 for share in shares)


def test_a_negative_point_changes_the_masks(page):
    image = upload(page, encoded())
    embed_all(page, image)
    pair = [[0.4, 0.6, 1], [0.45, 0.65, 1]]
    kept = predict(page, image, points=pair)["masks"][0]
    pair[1][2] = 0
    assert predict(page, image, points=pair)["masks"][0]["runs"] != kept["runs"]


def test_an_image_is_embedded_once_by_each_network(folders, monkeypatch):
    opened = subjects.open_runs(folders, "cpu", trust=True)
    calls = []
    counted = {
        name: subjects.Subject(name, "", lambda *a, n=name, f=each.embed: calls.append(n) or f(*a))
        for name, each in opened.subjects.items()
    }
    held = pictures.Pictures(replace(opened, subjects=counted))
    image = held.open(encoded(), "a")
    first = [held.embedding(image, name) for name in opened.subjects]
    again = held.open(encoded(), "b")
    assert again is image and [held.embedding(again, name) for name in opened.subjects] == first
    assert calls == ["teacher", "one", "two"]
    assert all(each.milliseconds > 0 for each in first)


def test_masks_come_from_the_embeddings_that_exist(page):
    image = upload(page, encoded("flower"))
    assert predict(page, image, points=[[0.5, 0.5, 1]])["masks"] == []
    answer(page.post(f"/api/images/{image['image']}/embedding?subject=one"))
    (entry,) = predict(page, image, points=[[0.5, 0.5, 1]])["masks"]
    assert entry["subject"] == "one" and entry["iou"] is None


def test_the_least_recently_used_image_is_dropped(folders):
    held = pictures.Pictures(subjects.open_runs(folders, "cpu", trust=True), held=2)
    first, second = (held.open(encoded(name), name) for name in ("coffee", "flower"))
    held.get(first.key)
    third = held.open(encoded("coins"), "coins")
    assert held.get(first.key) is first and held.get(third.key) is third
    with pytest.raises(pictures.UnknownImage):
        held.get(second.key)


def test_an_image_that_is_not_in_memory_is_said_to_be_gone(page):
    made = answer(page.post("/api/images/0123/masks", json={"points": [[0, 0, 1]]}), 410)
    assert "no longer in memory" in made["error"]


def test_an_upload_over_the_limit_is_refused_without_reading_it_all(page, monkeypatch):
    monkeypatch.setattr(app, "UPLOAD", 3_000_000)
    assert "larger than 3 MB" in answer(page.post("/api/images", content=b"0" * 3_000_001), 413)["error"]
    read = []

    def endless():
        for _ in range(1000):
            read.append(1)
            yield b"0" * 100_000

    assert "larger than 3 MB" in answer(page.post("/api/images", content=endless()), 413)["error"]


@pytest.mark.parametrize("data", [b"", b"not an image", encoded()[:2000]], ids=["empty", "text", "truncated"])
def test_a_bad_image_is_a_message_that_names_it(page, data):
    made = answer(page.post("/api/images?name=holiday.png", content=data), 400)
    assert "holiday.png: cannot be decoded" in made["error"] if data else "is empty" in made["error"]


def test_an_image_of_too_many_pixels_is_a_message(folders):
    opened = subjects.open_runs(folders, "cpu", trust=True)
    small = replace(opened, decoding=Decoding(max_pixels=1000))
    with pytest.raises(UserError, match=r"a.png: cannot be decoded: 300 x 200 = 60000 pixels, more than"):
        pictures.Pictures(small).open(encoded(), "a.png")


def test_grey_transparent_and_turned_images_open(page):
    turned = PIL.Image.fromarray(photograph("coffee")).resize((300, 200))
    exif = turned.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=exif)
    assert upload(page, file.getvalue())["original"] == [300, 200]
    for mode in ("L", "RGBA", "I;16"):
        file = io.BytesIO()
        PIL.Image.new(mode, (40, 30)).save(file, "PNG")
        assert upload(page, file.getvalue())["shown"] == [768, 1024]


WRONG = {
    "nothing": ({}, "neither a point nor a box"),
    "outside": ({"points": [[0.2, 1.5, 1]]}, "expected 3 numbers from 0 to 1"),
    "label": ({"points": [[0.2, 0.5, 0.5]]}, "1 or 0"),
    "box": ({"box": [0, 0, 1]}, "expected 4 numbers"),
    "many": ({"points": [[0, 0, 1]] * 65}, "at most 64"),
    "mask": ({"points": [[0, 0, 1]], "mask": "7"}, "expected one of auto, 0, 1, 2, 3"),
    "list": ([], "expected an object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_prompt_is_a_message(page, name):
    prompt, reason = WRONG[name]
    image = upload(page, encoded())
    assert reason in answer(page.post(f"/api/images/{image['image']}/masks", json=prompt), 400)["error"]


def test_a_request_that_is_no_json_or_of_no_network_is_a_message(page):
    image = upload(page, encoded())
    address = f"/api/images/{image['image']}"
    assert "not JSON" in answer(page.post(f"{address}/masks", content=b"{"), 400)["error"]
    assert "none of teacher, one, two" in answer(page.post(f"{address}/embedding?subject=x"), 400)["error"]
    assert "SAM" in answer(page.post(f"{address}/scores", json={"labels": ["a"]}), 400)["error"]


def test_corners_of_a_box_may_be_given_in_any_order():
    assert masks.MaskPrompt.from_json({"box": [0.7, 0.9, 0.2, 0.1]}).box == (0.2, 0.1, 0.7, 0.9)


def test_runs_of_pixels_begin_outside():
    assert masks.runs(np.array([[0, 1, 1], [1, 0, 0]], bool)) == [1, 3, 2]
    assert masks.runs(np.ones((2, 2), bool)) == [0, 4]
    assert masks.runs(np.zeros((2, 2), bool)) == [4]


def test_the_session_lists_networks_and_samples(page):
    session = answer(page.get("/api/session"))
    assert session["kind"] == "masks"
    assert [(each["name"], each["teacher"]) for each in session["subjects"]] == [
        ("teacher", True),
        ("one", False),
        ("two", False),
    ]
    groups = [sample["group"] for sample in session["samples"]]
    assert groups == ["photographs"] * 4 + ["validation"] * 8  # the toy recipe's images ship with the package
    for number in (0, 4):
        thumbnail = page.get(f"/api/samples/{number}")
        assert PIL.Image.open(io.BytesIO(thumbnail.content)).height == samples.THUMBNAIL or number
    assert "there are 12" in answer(page.get("/api/samples/12"), 404)["error"]


def test_a_validation_image_takes_the_teachers_embedding_from_the_cache(page, folders):
    image = answer(page.post("/api/samples/5"))
    assert embed_all(page, image)["teacher"]["milliseconds"] is None
    opened = subjects.open_runs(folders, "cpu", trust=True)
    sample = samples.gather(opened)[5]
    held = pictures.Pictures(opened)
    stored = held.embedding(held.open(sample.read(), sample.name, sample.place), "teacher").embedding
    computed = held.embedding(held.open(sample.read(), sample.name), "teacher").embedding
    assert stored.shape == (32, 4, 4) and torch.allclose(stored, computed, atol=1e-5)


def test_weights_are_those_of_srw_without_the_padding(page, folders):
    data = encoded(size=(64, 32))
    image = upload(page, data)
    made = answer(page.get(f"/api/images/{image['image']}/weights"))
    pixels, size = cache.open_cache(load_saved(folders[0], ["trust=true"])).preprocess.prepare(
        np.array(PIL.Image.open(io.BytesIO(data)))
    )
    map_CN = tiny.teacher()(pixels[None], torch.tensor([size]))["embedding"][0, :, :2].flatten(1)
    unit = F.normalize(map_CN.double(), dim=0)
    expected = torch.softmax(-(unit.T @ unit).mean(1) / 0.5, 0) * 8
    weights = torch.tensor(made["weights"])
    assert weights.shape == (2, 4) and torch.allclose(weights.flatten().double(), expected, atol=1e-3)
    assert made["patch"] == [0.25, 0.5] and "temperature 0.5, as one was trained" in made["about"]


def test_a_missing_teacher_leaves_its_cached_embeddings(folders, monkeypatch):
    def missing(*arguments, **settings):
        raise UserError("teacher.weights=gone.pth: no such file")

    monkeypatch.setattr("fmdistill.teachers.build", missing)
    page = client(folders)
    (teacher, *_) = answer(page.get("/api/session"))["subjects"]
    assert "gone.pth" in teacher["problem"]
    uploaded = upload(page, encoded())
    refused = page.post(f"/api/images/{uploaded['image']}/embedding?subject=teacher")
    assert "not at hand for this image: teacher.weights=gone.pth" in answer(refused, 400)["error"]
    assert "not at hand" in answer(page.get(f"/api/images/{uploaded['image']}/weights"), 400)["error"]
    embedded = answer(page.post("/api/samples/4"))
    embed_all(page, embedded)
    made = predict(page, embedded, points=[[0.5, 0.5, 1]])["masks"]
    assert len(made) == 3 and made[0]["iou"] == 1.0


def test_another_teacher_than_the_caches_is_not_used(folders, monkeypatch):
    monkeypatch.setattr("fmdistill.teachers.build", lambda settings: tiny.teacher(seed=5))
    opened = subjects.open_runs(folders, "cpu", trust=True)
    assert "other weights" in opened.subjects["teacher"].problem and opened.subjects["teacher"].embed is None


def test_a_run_without_its_cache_uses_the_teacher(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(subjects, "_cache", lambda run: None)
    page = client(folders)
    image = upload(page, encoded())
    embed_all(page, image)
    assert len(predict(page, image, points=[[0.5, 0.5, 1]])["masks"]) == 3
    monkeypatch.setattr(subjects, "_teacher", lambda run, cache: (None, "its file is gone"))
    with pytest.raises(UserError, match="neither its cache nor its teacher is at hand .its file is gone"):
        client(folders)


def test_runs_of_two_teachers_are_refused(folders, tmp_path):
    other = sam_runs(tmp_path, "other")
    path = tmp_path / "other/recipe.yaml"
    path.write_text(path.read_text().replace("name: tiny:teacher", "name: tiny:teacher\n  seed: 3"))
    with pytest.raises(UserError, match="other: was distilled from another teacher"):
        subjects.open_runs([folders[0], *other], "cpu", trust=True)


def test_code_outside_the_package_needs_trust(folders):
    with pytest.raises(UserError, match="trust=true"):
        subjects.open_runs(folders, "cpu")


def test_answers_name_the_error_of_the_server_itself(page, monkeypatch):
    image = upload(page, encoded())
    embed_all(page, image)

    def broken(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(masks, "predict", broken)
    response = page.post(f"/api/images/{image['image']}/masks", content=json.dumps({"points": [[0, 0, 1]]}))
    assert answer(response, 500)["error"] == "RuntimeError: out of memory"
