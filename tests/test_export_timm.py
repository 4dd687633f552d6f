"""The exported file is all that timm needs: embeddings from a picture in a process without fmdistill."""

import json
import subprocess
import sys

import clip_run
import PIL.Image
import pytest
import timm
import torch
from nondegenerate import randomize
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fmdistill.backbones.clip import ClipPreprocess
from fmdistill.backbones.tinyvit_clip import tinyvit_clip
from fmdistill.export import timm_checkpoint
from fmdistill.mini.tinyvit import tinyvit_clip_mini
from fmdistill.registry import UserError
from fmdistill.teachers.timm import TimmPreprocess

PREPROCESS = TimmPreprocess(64, 64, (0.5, 0.4, 0.3), (0.3, 0.25, 0.2), "bilinear", 0.9, "squash")
ELSEWHERE = """
import json, sys, timm, PIL.Image, torch
from safetensors import safe_open
from safetensors.torch import save_file
exported, picture, out = sys.argv[1:]
with safe_open(exported, "pt") as file:
    config = json.loads(file.metadata()["timm"])
model = timm.create_model(
    config["architecture"], num_classes=config["num_classes"], checkpoint_path=exported, **config["model_args"]
).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=config["pretrained_cfg"]))
with torch.no_grad():
    save_file({"embedding": model(transform(PIL.Image.open(picture).convert("RGB"))[None])}, out)
assert not any(name.partition(".")[0] == "fmdistill" for name in sys.modules), "fmdistill was imported"
"""


def embedding(student: nn.Module, preprocess, picture) -> torch.Tensor:
    pixels, size = preprocess.prepare(PIL.Image.open(picture).convert("RGB"))
    with torch.no_grad():
        return student.eval()(preprocess.normalize(pixels[None], torch.tensor([size])))["embedding"]


@pytest.mark.parametrize("make", [tinyvit_clip, tinyvit_clip_mini])
@pytest.mark.slow
def test_timm_alone_gives_the_student_s_embedding(make, tmp_path):
    student, out = randomize(make(embed_dim=24, image_size=64), 3), tmp_path / "deep/model.safetensors"
    assert timm_checkpoint.export(student, PREPROCESS, out) == out
    (tmp_path / "picture.png").write_bytes(clip_run.picture(4))
    arguments = [out, tmp_path / "picture.png", tmp_path / "made.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    expected = embedding(student, PREPROCESS, tmp_path / "picture.png")
    assert expected.shape == (1, 24) and expected.std() > 0.1
    torch.testing.assert_close(load_file(tmp_path / "made.safetensors")["embedding"], expected, atol=1e-5, rtol=1e-5)
    assert all(value.dtype in (torch.float32, torch.int64) for value in load_file(out).values())


def test_a_name_and_the_width_are_enough_for_a_full_size(tmp_path):
    student = randomize(tinyvit_clip("5m", embed_dim=24, image_size=64), 3)
    out = timm_checkpoint.export(student, PREPROCESS, tmp_path / "model.safetensors")
    model = timm.create_model("tiny_vit_5m_224", num_classes=24, checkpoint_path=out).eval()
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, trunk = student(image)["embedding"], student.trunk(image)
        torch.testing.assert_close(model(image), expected, atol=1e-5, rtol=1e-5)
        model.reset_classifier(0)
        torch.testing.assert_close(model(image), trunk, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("mode", "crop"), [("shortest", {"crop_pct": 1.0}),
                                            ("squash", {"crop_pct": 1.0, "crop_mode": "squash"})])  # fmt: skip
def test_a_clip_teacher_s_preprocessing_is_told_in_timm_s_words(mode, crop, tmp_path):
    preprocess = ClipPreprocess(64, 32, resize_mode=mode)
    student = tinyvit_clip_mini(embed_dim=8, image_size=64)
    out = timm_checkpoint.export(student, preprocess, tmp_path / "model.safetensors")
    with safe_open(out, "pt") as file:
        told = json.loads(file.metadata()["timm"])["pretrained_cfg"]
    assert crop.items() <= told.items()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=told))
    (tmp_path / "picture.png").write_bytes(clip_run.picture(4))
    picture = PIL.Image.open(tmp_path / "picture.png").convert("RGB")
    pixels, size = preprocess.prepare(picture)
    expected = preprocess.normalize(pixels[None], torch.tensor([size]))[0]
    torch.testing.assert_close(transform(picture), expected, atol=1e-5, rtol=1e-5)


def test_another_student_is_refused(tmp_path):
    with pytest.raises(UserError, match="export timm: the student is a Student, .* train a `tinyvit_clip`"):
        timm_checkpoint.export(clip_run.Student(), PREPROCESS, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
