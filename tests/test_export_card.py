"""A model card says what the run states, and "not stated" where nobody said it."""

import json
from pathlib import Path

import clip_run
import pytest
import tiny
import yaml
from nondegenerate import randomize

from fmdistill import cache, evaluate, export
from fmdistill.cli import main
from fmdistill.distill.student import WEIGHTS
from fmdistill.export.card import NAME, write_card
from fmdistill.export.source import FinishedRun, without_folders
from fmdistill.registry import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Make a toy SAM's cache and the run of an untrained student, evaluated by one protocol."""
    folder = tmp_path_factory.mktemp("card")
    recipe = tiny.load(folder, "title=a | toy", "seed=3", "images.train=8")
    cache.run(recipe)
    clip_run.finish(recipe, randomize(tiny.Student()))
    (folder / "close.yaml").write_text("name: cosine\nworkers: 0\n")
    evaluate.run(folder / "close.yaml", recipe.out, ["trust=true"])
    return Path(recipe.out)


def written(run: Path, folder: Path, check: dict | None = None, **stated: str) -> tuple[dict, str]:
    """Write the card of a folder with one network file; return its front matter and its text."""
    folder.mkdir(exist_ok=True)
    (folder / "encoder.onnx").write_bytes(b"12345")
    text = write_card(folder, FinishedRun.of(run, trust=True, **stated), check or {}).read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_card_states_recipe_figures_protocol_and_files(run, tmp_path):
    check = {"miou": 0.99951, "worst": {"picture": "cat.png", "miou": 0.9912345678}}
    front, body = written(run, tmp_path / "out", check)
    assert front == {
        "library_name": "onnx",
        "pipeline_tag": "mask-generation",
        "tags": ["knowledge-distillation", "fmdistill", "sam"],
    }
    lines = body.splitlines()
    assert "# a | toy" in lines and "| Seed | 3 |" in lines and "| Length | 12 steps of 8 images |" in lines
    assert "| Images | `photos`: train 8, validation 8, size 64, shard_size 8 |" in lines
    assert (
        '| Objective `embedding` | distance {"name": "mse"}, weighting {"name": "srw", "temperature": 0.5} |' in lines
    )
    assert "| `miou` | 0.99951 |" in lines and "| `worst.miou` | 0.991235 |" in lines
    assert "| `worst.picture` | cat.png |" in lines and "| `encoder.onnx` | 5 |" in lines
    assert any(line.startswith("Protocol `close`: `cosine`") for line in lines)
    stored = json.loads((run / "evaluation/close.json").read_text())["rows"]
    value = next(row["value"] for row in stored if row["subject"] == "student")
    (row,) = [line for line in lines if line.startswith(f"| {stored[0]['metric']}")]
    assert f"| {value:.4f}" in row
    assert "| Metric | student | mean embedding |" in lines


def test_a_licence_that_nobody_stated_is_not_guessed(run, tmp_path):
    front, body = written(run, tmp_path / "out")
    for part in ("student's weights", "teacher's weights", "training images"):
        assert f"| The {part} | not stated |" in body
    assert "license" not in front
    front, body = written(run, tmp_path / "out", license="cc-by-4.0", images_license="CC BY 2.0, of Flickr users")
    assert front["license"] == "cc-by-4.0" and "| The student's weights | cc-by-4.0 |" in body
    assert "| The training images | CC BY 2.0, of Flickr users |" in body


@pytest.mark.parametrize(
    ("teacher", "licence"),
    [
        ({"name": "sam_vit_h", "weights": "/x/sam_vit_h.pth"}, "Apache-2.0 (Segment Anything)"),
        ({"name": "open_clip", "model": "ViT-B-32", "pretrained": "openai"}, "MIT (OpenAI's CLIP)"),
        ({"name": "open_clip", "model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}, "not stated"),
        ({"name": "open_clip", "model": "local-dir:/x/mine"}, "not stated"),
        ({"name": "sam_mini"}, "Apache-2.0 (packaged with fmdistill)"),
        ({"name": "sam_mini", "weights": "/x/mine"}, "not stated"),
        ({"name": "mine:teacher"}, "not stated"),
    ],
)
def test_the_teacher_s_licence_is_that_of_its_published_weights(teacher, licence):
    from fmdistill.export import card

    assert card._teacher(teacher) == licence


def test_a_result_of_other_weights_is_left_out(run, tmp_path, caplog):
    path = run / "evaluation/close.json"
    before = path.read_text()
    stored = json.loads(before)
    stored["of"]["weights"]["student"] = "0" * 64
    path.write_text(json.dumps(stored))
    try:
        _, body = written(run, tmp_path / "out")
    finally:
        path.write_text(before)
    assert "Protocol `close`" not in body and "has no evaluation of these weights" in body


def test_no_folder_or_password_of_the_author_is_published():
    settings = {
        "root": "/home/me/photos",
        "weights": ["~/w.pth", "../w.pth"],
        "tar": "https://me:word@x.org/a/b.tar?k=1",
    }
    settings |= {"model": "local-dir:/home/me/clip", "name": "tar", "train": "{00000..00330}.tar", "rate": 0.5}
    assert without_folders(settings) == {
        "root": "photos",
        "weights": ["w.pth", "w.pth"],
        "tar": "b.tar",
        "model": "local-dir:clip",
        "name": "tar",
        "train": "{00000..00330}.tar",
        "rate": 0.5,
    }


def test_an_openclip_folder_has_a_card_that_names_its_library(tmp_path):
    recipe = clip_run.finished_tinyvit(tmp_path)
    assert main(["export", recipe.out, "openclip", str(tmp_path / "out"), "license=mit"]) == 0
    _, front, body = (tmp_path / "out" / NAME).read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "mit",
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["knowledge-distillation", "fmdistill", "clip"],
    }
    assert "text tower" in body and str(tmp_path) not in body and "local-dir:teacher" in body
    assert (Path(recipe.out) / WEIGHTS).is_file()


def test_a_licence_that_no_card_can_hold_is_refused_before_anything_is_read(tmp_path):
    for settings, says in (
        ({"license": "Apache 2.0"}, "expected one of Hugging Face's identifiers, such as apache-2.0"),
        ({"images_license": "a\nb"}, "expected a licence's name in one line"),
    ):
        with pytest.raises(UserError, match=says):
            export.run(tmp_path / "nowhere", "openclip", tmp_path / "out", settings=settings)
    with pytest.raises(UserError, match="license=mit: for the model card of a folder, but half is one file"):
        export.run(tmp_path / "nowhere", "half", tmp_path / "out", settings={"license": "mit"})
