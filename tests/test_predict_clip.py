"""Embeddings and classes from a run or a folder equal those of the evaluation and of open_clip itself."""

import io

import clip_run
import clips
import numpy as np
import open_clip
import pytest
import served
import torch
from PIL import Image
from torch.nn import functional as F

import fmdistill
from fmdistill.backbones.clip import ClipPreprocess, TextHead
from fmdistill.distill import load_student
from fmdistill.evaluate import text_classifier
from fmdistill.evaluate.subjects import embed
from fmdistill.predict.clip import ClipPredictor
from fmdistill.registry import UserError

LABELS = ["red fox", "owl", "tram"]
TEMPLATES = ["a photo of a {}.", "a {} in the snow"]


def pictures() -> list[Image.Image]:
    return [Image.open(io.BytesIO(clips.picture(number, (40 + 8 * number, 48)))).convert("RGB") for number in range(3)]


def towers(calls: list[int]) -> ClipPredictor:
    """A predictor of two callables that a test can compute by hand: mean colours, and the lengths of the words."""

    def image(image_B3SS: np.ndarray) -> np.ndarray:
        calls.append(len(image_B3SS))
        assert image_B3SS.dtype == np.float32 and image_B3SS.shape[1:] == (3, 8, 8)
        return image_B3SS.mean((2, 3)) * 7

    def text(texts: list[str]) -> np.ndarray:
        return np.array([[text.count(letter) for letter in "rgb"] for text in texts], np.float64) * 5

    return ClipPredictor(image, text, ClipPreprocess(8, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), 2.0)


def test_two_callables_a_preprocessing_and_a_scale_make_a_predictor():
    calls: list[int] = []
    predictor = towers(calls)
    colours = [np.full((9, 9, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 255, 0), (255, 255, 0))]
    embedding_ND = predictor.encode_image(colours, batch=2)
    half = 0.5**0.5
    assert np.allclose(embedding_ND, [[1, 0, 0], [0, 1, 0], [half, half, 0]], atol=1e-6)
    assert embedding_ND.dtype == np.float32 and calls == [2, 1]
    assert np.allclose(predictor.encode_text(["r", "gg", "rg"]), embedding_ND, atol=1e-6)
    likely_NL = predictor.classify(colours, ["r", "b"], templates="{}")
    expected = np.exp([[2, 0], [0, 0], [2 * half, 0]])
    assert np.allclose(likely_NL, expected / expected.sum(1, keepdims=True), atol=1e-6)
    # embeddings of "r" and "rg", averaged before they are normalised again
    two = predictor.classify(colours[:1], ["r", "b"], templates=["{}", "{}g"])
    cosine = np.array([(1 + half) / np.hypot(1 + half, half), 0])
    assert np.allclose(two, np.exp(2 * cosine) / np.exp(2 * cosine).sum(), atol=1e-6)


def test_one_image_a_list_an_array_of_images_and_paths_mean_the_same(tmp_path):
    predictor = towers([])
    image = pictures()[0]
    image.save(tmp_path / "a.png")
    expected = predictor.encode_image([image])
    assert expected.shape == (1, 3)
    for same in (image, np.array(image), np.array(image)[None], str(tmp_path / "a.png"), [tmp_path / "a.png"]):
        assert np.array_equal(predictor.encode_image(same), expected)
    assert predictor.encode_image((image, tmp_path / "a.png")).shape == (2, 3)
    assert predictor.encode_text("r").shape == (1, 3)


def test_a_run_embeds_and_classifies_as_its_evaluation_does(tmp_path):
    run = served.clip_folder(tmp_path)
    predictor = fmdistill.load(run, device="cpu", trust=True)
    student, head = load_student(run, trust=True), TextHead.load(tmp_path / "cache")
    preprocess = predictor.preprocess
    assert preprocess.image_size == clip_run.SIZE and preprocess.mean == (0.48, 0.45, 0.4)
    prepared, sizes = zip(*map(preprocess.prepare, pictures()), strict=True)
    expected = F.normalize(embed(student, preprocess, torch.stack(prepared), torch.tensor(sizes)), dim=-1)
    assert np.allclose(predictor.encode_image(pictures()), expected.numpy(), atol=1e-6)
    texts = F.normalize(head.encode_text(LABELS), dim=-1)
    assert np.allclose(predictor.encode_text(LABELS), texts.numpy(), atol=1e-6)
    weight_DK = text_classifier.classifier(head, LABELS, TEMPLATES, torch.device("cpu"), None)
    likely = (head.scale * expected @ weight_DK).softmax(-1).numpy()
    assert np.allclose(predictor.classify(pictures(), LABELS, TEMPLATES), likely, atol=1e-6)
    assert predictor.scale == head.scale and np.ptp(likely) > 1e-3


def test_a_folder_of_open_clip_gives_open_clip_s_embeddings(tmp_path):
    name = clips.folder(tmp_path / "clip")
    predictor = fmdistill.load(tmp_path / "clip", device="cpu")
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    with torch.no_grad():
        image = model.encode_image(torch.stack([transform(picture) for picture in pictures()]), normalize=True)
        text = model.encode_text(tokenizer(LABELS), normalize=True)
        likely = (model.logit_scale.exp() * image @ text.T).softmax(-1)
    assert np.allclose(predictor.encode_image(pictures()), image.numpy(), atol=1e-5)
    assert np.allclose(predictor.encode_text(LABELS), text.numpy(), atol=1e-5)
    assert np.allclose(predictor.classify(pictures(), LABELS, "{}"), likely.numpy(), atol=1e-5)


def test_what_cannot_be_embedded_is_one_line():
    predictor = towers([])
    image = pictures()[0]
    for call, says in (
        (lambda: predictor.encode_image([]), "images: the list is empty"),
        (lambda: predictor.encode_image(3), "expected an image or a list of images, got int"),  # type: ignore[arg-type]
        (lambda: predictor.encode_image([image, None]), "got NoneType"),  # type: ignore[list-item]
        (lambda: predictor.encode_image("nowhere.png"), "image nowhere.png: cannot be read"),
        (lambda: predictor.encode_text([]), "texts: expected a list of texts"),
        (lambda: predictor.encode_text([1]), r"texts: expected a list of texts, got \[1\]"),  # type: ignore[list-item]
        (lambda: predictor.classify(image, []), "labels: expected a list of texts"),
        (lambda: predictor.classify(image, ["a"], "a photo"), "'a photo' needs {} once"),
        (lambda: predictor.encode_image(image, batch=0), "batch=0: expected 1 or more"),
    ):
        with pytest.raises(UserError, match=says):
            call()
