"""open_clip needs only the exported folder: it computes bit-equal embeddings in a process without fmdistill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import clip_run
import open_clip
import PIL.Image
import pytest
import tiny
import torch
from nondegenerate import randomize
from safetensors.torch import load_file, save_file
from torch import nn

from fmdistill import cache, export
from fmdistill.backbones.tinyvit_clip import tinyvit_clip
from fmdistill.distill.student import load_student
from fmdistill.export import card, openclip, push
from fmdistill.mini.clip import clip_mini_student
from fmdistill.mini.tinyvit import tinyvit_clip_mini
from fmdistill.predict import artefact
from fmdistill.registry import UserError

FILES = [card.NAME, artefact.NAME, openclip.CONFIG, openclip.WEIGHTS]
TEXTS = ["a photo of a red fox", "the sky, at night"]
ELSEWHERE = """
import sys, torch, open_clip, PIL.Image
from safetensors.torch import load_file, save_file
folder, given, out, picture, *texts = sys.argv[1:]
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)
model.eval()
tokens = open_clip.get_tokenizer("local-dir:" + folder)(texts)
pixels = load_file(given)["pixels"]
with torch.no_grad():
    outputs = {"image": model.encode_image(pixels), "text": model.encode_text(tokens)}
outputs |= {"prepared": preprocess(PIL.Image.open(picture)), "scale": model.logit_scale.detach().reshape(1)}
save_file({name: value.contiguous() for name, value in outputs.items()}, out)
assert not any(name.partition(".")[0] == "fmdistill" for name in sys.modules), "fmdistill was imported"
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """Make a folder with the cache of a toy CLIP and the run of a TinyViT with random weights and statistics."""
    folder = tmp_path_factory.mktemp("openclip")
    clip_run.finished_tinyvit(folder)
    (folder / "picture.png").write_bytes(clip_run.picture(4))
    return folder


def elsewhere(folder: Path, exported: Path) -> dict[str, torch.Tensor]:
    """Return open_clip's outputs from the export, computed in another process."""
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    save_file({"pixels": pixels}, folder / "given.safetensors")
    arguments = [exported, folder / "given.safetensors", folder / "outputs.safetensors", folder / "picture.png", *TEXTS]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {"pixels": pixels, **load_file(folder / "outputs.safetensors")}


@pytest.mark.slow
def test_another_process_gets_bit_equal_embeddings_without_our_code(ran):
    out = export.run(ran / "run", "openclip", ran / "deep" / "openclip")
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert [path.name for path in out.parent.iterdir()] == ["openclip"]
    outputs = elsewhere(ran, out)
    opened = cache.open_cache(clip_run.load(ran, *clip_run.TINYVIT))
    student, head = load_student(ran / "run").eval(), opened.head()
    with torch.no_grad():
        assert torch.equal(student(outputs["pixels"])["embedding"], outputs["image"])
        assert torch.equal(head.encode_text(TEXTS), outputs["text"])
    assert outputs["image"].std(0).min() > 1e-4 and float(outputs["scale"].exp()) == pytest.approx(head.scale)
    pixels, size = opened.preprocess.prepare(PIL.Image.open(ran / "picture.png"))
    assert torch.equal(opened.preprocess.normalize(pixels[None], torch.tensor([size]))[0], outputs["prepared"])


def test_quick_gelu_survives(ran):
    def texts(folder: Path) -> torch.Tensor:
        model = open_clip.create_model(f"local-dir:{folder}").eval()
        with torch.no_grad():
            return model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS))

    out = export.run(ran / "run", "openclip", ran / "gelu")
    config = json.loads((out / openclip.CONFIG).read_text())
    assert config["model_cfg"]["quick_gelu"] is True
    assert torch.equal(texts(out), texts(ran / "teacher"))
    config["model_cfg"]["quick_gelu"] = False
    (out / openclip.CONFIG).write_text(json.dumps(config))  # it loads without a word
    assert (texts(out) - texts(ran / "teacher")).abs().max() > 1e-3


@pytest.mark.slow
def test_a_folder_appears_whole_replaces_an_export_and_nothing_else(ran, tmp_path, monkeypatch):
    out = export.run(ran / "run", "openclip", tmp_path / "out")
    (out / "stale").write_text("")
    before = (out / openclip.WEIGHTS).read_bytes()

    def broken(*arguments, **settings):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(openclip, "write_whole", broken)
        export.run(ran / "run", "openclip", out)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(open_clip, "create_model", broken)
        export.run(ran / "run", "openclip", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "stale").is_file()
    assert export.run(ran / "run", "openclip", out) == out
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (out / openclip.WEIGHTS).read_bytes() == before

    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("other", "file"):
        with pytest.raises(UserError, match=f"{name}: already exists and is not an openclip export"):
            export.run(ran / "run", "openclip", tmp_path / name)
    assert (tmp_path / "other/notes.txt").is_file()


def test_the_folder_describes_itself_and_states_what_open_clip_computes(ran, tmp_path, monkeypatch):
    described = artefact.read(export.run(ran / "run", "openclip", tmp_path / "out"))
    assert (described.kind, described.format, described.model) == ("clip", "openclip", {"runtime": "torch"})
    assert described.check["image_cosine"]["min"] > 0.999999 and described.check["text_cosine"]["min"] > 0.999999
    assert push.run(tmp_path / "out", "me/clip", dry_run=True)[-1].endswith(
        "would go to https://huggingface.co/me/clip"
    )

    created = open_clip.create_model

    def other(*arguments, **settings):
        return randomize(created(*arguments, **settings), 9)

    monkeypatch.setattr(open_clip, "create_model", other)
    with pytest.raises(UserError, match="the image tower's embeddings differ from the student's"):
        export.run(ran / "run", "openclip", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("student", "says"),
    [
        (lambda: nn.Linear(2, 2), "the student is a Linear; open_clip builds image towers from timm"),
        (lambda: tinyvit_clip_mini(24, 32), "timm has none of this size"),
        (lambda: tinyvit_clip(embed_dim=16, image_size=32), "embedding has 16, its teacher's 24"),
        (lambda: tinyvit_clip(embed_dim=24, image_size=64), "image side is 64, its teacher's 32"),
    ],
)
def test_a_student_that_does_not_fit_raises_one_clear_line(ran, tmp_path, student, says):
    opened = cache.open_cache(clip_run.load(ran))
    with pytest.raises(UserError, match=says) as error:
        openclip.export(student(), opened.head(), opened.preprocess, tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_run_without_a_text_tower_is_one_clear_line(tmp_path):
    sam = tiny.load(tmp_path, "train.steps=1")
    clip_run.finish(sam, tiny.Student())
    with pytest.raises(UserError, match="no cache here"):
        export.run(sam.out, "openclip", tmp_path / "out", trust=True)
    cache.run(sam)
    with pytest.raises(UserError, match="of the family 'sam' and has no text tower; openclip exports runs"):
        export.run(sam.out, "openclip", tmp_path / "out", trust=True)


def test_a_clip_mini_is_exported_with_both_towers_and_the_whole_vocabulary(tmp_path):
    student = randomize(clip_mini_student(), 2).eval()
    torch.manual_seed(0)
    pixels, texts = torch.randn(3, 3, 64, 64), ["a plain red circle", "a photo of a striped blue star"]
    openclip.export_whole(student, tmp_path / "folder")
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'folder'}", require_pretrained=True).eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'folder'}")(texts)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), student(pixels)["embedding"])
        assert torch.equal(loaded.encode_text(tokens), student.encode_text(tokens))
