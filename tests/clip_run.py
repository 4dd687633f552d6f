"""A CLIP run at toy size: an open_clip folder as the teacher, class folders or tars as images, an untrained student."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import PIL.Image
import torch
from nondegenerate import randomize
from safetensors.torch import save_file
from torch import nn

from fmdistill import cache
from fmdistill import recipe as recipes
from fmdistill.backbones.tinyvit_clip import tinyvit_clip
from fmdistill.distill import checkpoint
from fmdistill.distill.student import WEIGHTS
from fmdistill.recipe import Recipe

SIZE, DIM = 32, 24
MODEL_CFG = {
    "embed_dim": DIM,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS_CFG = {"size": SIZE, "mean": [0.48, 0.45, 0.4], "std": [0.26, 0.26, 0.27], "interpolation": "bicubic"}
CLASSES = {"b_fox": "red fox", "a_owl": "owl", "d_tram": "tram", "c_pear": "pear", "e_sky": "sky", "f_ice": "ice"}


class Student(nn.Module):
    """Convolutions, a BatchNorm and a projection to the teacher's width."""

    image_size, out_channels = SIZE, DIM

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 8, 8), nn.BatchNorm2d(16), nn.GELU(), nn.Flatten(), nn.Linear(256, DIM)
        )

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"embedding": (B, 24)}."""
        return {"embedding": self.net(image)}


class Model(nn.Module):
    """A model for open_clip's functions, with the student's image tower and the teacher's text tower."""

    def __init__(self, student: nn.Module, clip: nn.Module) -> None:
        super().__init__()
        self.student, self.clip = student, clip

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        embedding = self.student(image)["embedding"]
        return nn.functional.normalize(embedding, dim=-1) if normalize else embedding


RECIPE = """
out: {folder}/run
images: {{name: image_classes, root: {folder}/train, validation_root: {folder}/val}}
teacher: {{name: open_clip, model: "local-dir:{folder}/teacher", device: cpu, workers: 0}}
cache: {{root: {folder}/cache}}
student: {{name: "clip_run:Student"}}
task: {{name: distill}}
objective:
  embedding: {{distance: {{name: mse}}, weighting: {{name: uniform}}}}
optimizer: {{name: adamw, lr: 0.003}}
schedule: {{name: cosine, warmup: 0.1}}
train: {{steps: 2, batch_size: 8, workers: 0, precision: fp32, device: cpu}}
"""


def write_teacher(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write an open_clip folder with non-degenerate weights; `changes` override its model_cfg."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": {**MODEL_CFG, **changes}, "preprocess_cfg": PREPROCESS_CFG}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = randomize(open_clip.create_model(f"local-dir:{folder}"), seed)
    with torch.no_grad():  # else its embeddings of different images are nearly equal
        model.visual.conv1.weight.mul_(6)
        model.visual.positional_embedding.mul_(0.2)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def picture(seed: int) -> bytes:
    """Return a PNG of coarse random colours in one of three sizes."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(((48, 40), (33, 64), (32, 32))[seed % 3], PIL.Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def write_classes(root: Path, each: int, seed: int = 0) -> None:
    """Write `each` images into a folder per class of CLASSES, and names.txt beside `root`."""
    for number, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i}.png").write_bytes(picture(seed + 1000 * number + i))
    names = [CLASSES[name] for name in sorted(CLASSES)]
    (root.parent / "names.txt").write_text("\n".join(names) + "\n")


def write_tar(path: Path, captions: list[str | None], seed: int = 0, labels: bool = False) -> None:
    """Write a tar as img2dataset does; an image whose caption is None has no .txt."""
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions):
            members = {"png": picture(seed + number)}
            if caption is not None:
                members["txt"] = caption.encode()
            if labels:
                members["cls"] = str(number % len(CLASSES)).encode()
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def load(folder: Path, *overrides: str) -> Recipe:
    """Write and return the toy recipe, whose cache and run are in `folder`."""
    (folder / "clip.yaml").write_text(RECIPE.format(folder=folder))
    return recipes.load(folder / "clip.yaml", overrides)


def finish(recipe: Recipe, student: nn.Module) -> Path:
    """Store `student` as the result of the recipe's training; return the run's folder."""
    recipes.save(recipe, recipe.out)
    checkpoint.save_state(student.state_dict(), Path(recipe.out) / WEIGHTS)
    return Path(recipe.out)


TINYVIT = ["student.name=tinyvit_clip", f"student.embed_dim={DIM}", f"student.image_size={SIZE}"]


def finished_tinyvit(folder: Path) -> Recipe:
    """Make the teacher, class folders, cache and run, in `folder`, of a TinyViT with random weights and statistics."""
    write_teacher(folder / "teacher")
    write_classes(folder / "train", 1)
    write_classes(folder / "val", 1, seed=50)
    recipe = load(folder, *TINYVIT)
    cache.run(recipe)
    finish(recipe, randomize(tinyvit_clip("5m", embed_dim=DIM, image_size=SIZE), 5))
    return recipe
