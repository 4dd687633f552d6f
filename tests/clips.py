"""A toy CLIP of open_clip's classes with non-degenerate weights, and tars of captioned photographs."""

import io
import json
import tarfile
from pathlib import Path

import torch
from nondegenerate import randomize
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from fmdistill import recipe as recipes
from fmdistill.mini.photos import photograph
from fmdistill.recipe import Recipe
from fmdistill.teachers.clip import ClipTeacher

MODEL_CFG = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS_CFG = {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.25, 0.2], "interpolation": "bicubic"}
PREPROCESS_CFG["resize_mode"] = "shortest"
CONFIG = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG, "tokenizer": "simple"}


def model(seed: int = 0, **changes) -> CLIP:
    """Return the toy CLIP, with QuickGELU and non-degenerate weights."""
    return randomize(CLIP(**{**MODEL_CFG, **changes}), seed)


def folder(path: Path, seed: int = 0) -> str:
    """Write the toy CLIP as a folder that open_clip loads; return its name for open_clip."""
    path.mkdir(exist_ok=True)
    (path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    save_file(model(seed).state_dict(), path / "open_clip_model.safetensors")
    return f"local-dir:{path}"


def teacher(seed: int = 0, tokens: bool = False, dtype: str = "fp32", batch: int = 4, captions: int = 0) -> ClipTeacher:
    """Return the toy CLIP as a teacher."""
    settings = {"tokens": tokens, "device": "cpu", "dtype": dtype, "batch": batch, "workers": 1, "captions": captions}
    return ClipTeacher(model(seed), CONFIG, name="toy", kind="toy", **settings)


def picture(number: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """Return a photograph as PNG bytes, cropped and scaled to `size` (w, h); each number has a different crop."""
    picture = Image.fromarray(photograph("coffee"))
    left = 7 * number % 300
    buffer = io.BytesIO()
    picture.crop((left, 3 * number % 100, left + 200, 200 + 3 * number % 100)).resize(size).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path: Path, members: list[tuple[str, bytes]]) -> None:
    """Write a tar of the members in order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def img2dataset(folder: Path, name: str, keys: list[str], captions: bool = True) -> None:
    """Write a tar as img2dataset does: KEY.jpg, KEY.json and KEY.txt for every key, which determines the image."""
    members: list[tuple[str, bytes]] = []
    for key in keys:
        members.append((f"{key}.jpg", picture(sum(map(ord, key)))))
        members += [(f"{key}.json", b"{}"), (f"{key}.txt", f"caption of {key}".encode())] * captions
    pack(folder / f"{name}.tar", members)


RECIPE = """
out: {folder}/run
images: {{name: tar, root: "{folder}", train: ["0*.tar"], validation: ["v*.tar"]}}
teacher: {{name: "clips:teacher"}}
cache: {{root: "{folder}/cache"}}
student: {{name: "tiny:Student"}}
task: {{name: distill}}
objective:
  embedding: {{distance: {{name: mse}}, weighting: {{name: uniform}}}}
optimizer: {{name: adamw, lr: 0.003}}
schedule: {{name: cosine, warmup: 0.1}}
train: {{steps: 2, batch_size: 4, workers: 0}}
"""


def load(folder: Path, *overrides: str) -> Recipe:
    """Write and return a recipe that caches the toy CLIP's outputs for the tars in `folder`."""
    path = folder / "clip.yaml"
    path.write_text(RECIPE.format(folder=folder))
    return recipes.load(path, overrides)


def embed(pixels_B3SS: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return open_clip's embeddings of normalised images."""
    with torch.no_grad():
        return model(seed).encode_image(pixels_B3SS)
