"""Toy timm models as timm's own folders, with weights that hide nothing, and a job with one of them as the teacher."""

import json
from pathlib import Path

import clip_run
import timm
from nondegenerate import randomize
from safetensors.torch import save_file
from torch import nn

from fmdistill import recipe as recipes
from fmdistill.recipe import Recipe

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
TOYS = {  # by name: architecture, its arguments, the images' side, interpolation, crop_pct, crop_mode
    "dinov3": ("vit_small_patch16_dinov3", VIT, 32, "bicubic", 0.875, "center"),
    "siglip": ("vit_base_patch16_siglip_224", VIT, 32, "bicubic", 1.0, "squash"),
    "convnext": ("convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, 64, "bilinear", 0.9, "center"),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "img_size": 64},
        64, "bicubic", 0.9, "border",
    ),
}  # fmt: skip


def model(kind: str, seed: int = 0, **changes: object) -> nn.Module:
    """Return the toy with non-degenerate weights."""
    name, arguments, *_ = TOYS[kind]
    return randomize(timm.create_model(name, **{"num_classes": 0, **arguments, **changes}), seed)


def write(folder: Path, kind: str = "dinov3", seed: int = 0) -> str:
    """Write the toy as timm's folder; return its name for timm."""
    name, arguments, side, interpolation, crop_pct, crop_mode = TOYS[kind]
    described = {
        "architecture": name,
        "num_classes": 0,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": "img_size" in arguments,
            "interpolation": interpolation,
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
            "mean": [0.5, 0.4, 0.3],
            "std": [0.3, 0.25, 0.2],
            "num_classes": 0,
            "classifier": "head.fc" if kind in ("convnext", "swin") else "head",
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described))
    save_file(model(kind, seed).state_dict(), folder / "model.safetensors")
    return f"local-dir:{folder}"


RECIPE = """
out: {folder}/run
images: {{name: image_classes, root: {folder}/train, validation_root: {folder}/val, shard_size: 8}}
teacher: {{name: timm, model: "local-dir:{folder}/teacher", device: cpu, batch: 4, workers: 0}}
cache: {{root: {folder}/cache}}
student: {{name: tinyvit_clip_mini, embed_dim: 32, image_size: 32}}
task: {{name: distill}}
objective:
  embedding: {{distance: {{name: cosine}}, weighting: {{name: srw, group: global_batch, temperature: 0.5}}}}
optimizer: {{name: adamw, lr: 0.001}}
schedule: {{name: cosine, warmup: 0.1}}
train: {{steps: 4, batch_size: 8, workers: 0, precision: fp32, device: cpu}}
"""


def write_job(folder: Path) -> Path:
    """Write the teacher, class folders of 18 training and 6 validation images, and the recipe; return its path."""
    write(folder / "teacher")
    clip_run.write_classes(folder / "train", 3)
    clip_run.write_classes(folder / "val", 1)  # pictures that the training images have too
    path = folder / "timm.yaml"
    path.write_text(RECIPE.format(folder=folder))
    return path


def load(folder: Path, *overrides: str) -> Recipe:
    """Return the recipe of the job in `folder`."""
    return recipes.load(folder / "timm.yaml", overrides)
