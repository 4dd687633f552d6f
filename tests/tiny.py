"""A whole pipeline at toy size: real classes, 64 px images, seconds on one core."""

from pathlib import Path
from typing import Any

import torch
from nondegenerate import tiny_sam
from torch import nn

from fmdistill import recipe as recipes
from fmdistill.cache.dataset import CachedImages
from fmdistill.files import write_whole
from fmdistill.recipe import Recipe
from fmdistill.teachers.sam import SamTeacher

CHANNELS = 32


def teacher(seed: int = 0, dtype: str = "fp32", batch: int = 4, workers: int = 1, exact: bool = False) -> SamTeacher:
    """Return a teacher with segment_anything's encoder at 64 px and non-degenerate weights."""
    return SamTeacher(
        tiny_sam(seed, 64, CHANNELS),
        name="tiny",
        device="cpu",
        dtype=dtype,
        batch=batch,
        workers=workers,
        exact=exact,
    )


def item(data: CachedImages, shard: int, index: int) -> dict[str, Any]:
    """Return one cached image as its batch has it, without the first dimension."""
    return first(data.batch([(shard, index)]))


def first(batch: Any) -> Any:
    """Return the first image of a batch."""
    return {name: first(value) for name, value in batch.items()} if isinstance(batch, dict) else batch[0]


class Student(nn.Module):
    """A few convolutions and a BatchNorm: parameters and buffers that a checkpoint must store."""

    image_size, out_channels = 64, CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 8, 8), nn.BatchNorm2d(16), nn.GELU(), nn.Conv2d(16, CHANNELS, 3, 2, padding=1)
        )

    @property
    def last_layers(self) -> dict[str, nn.Module]:
        """The layer that makes each output."""
        return {"embedding": self.net[-1]}

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"embedding": (B, 32, 4, 4)}."""
        return {"embedding": self.net(image)}


RECIPE = """
out: {folder}/run
images: {{name: photos, train: 24, validation: 8, size: 64, shard_size: 8}}
teacher: {{name: "tiny:teacher"}}
cache: {{root: {folder}/cache, codec: fp16}}
student: {{name: "tiny:Student"}}
task: {{name: distill}}
objective:
  embedding: {{distance: {{name: mse}}, weighting: {{name: srw, temperature: 0.5}}}}
optimizer: {{name: adamw, lr: 0.003}}
schedule: {{name: cosine, warmup: 0.1}}
train: {{steps: 12, batch_size: 8, workers: 0, window: 2, precision: fp32, log_every: 1, validate_every: 6,
  checkpoint_every: 4, device: cpu}}
"""


def write(folder: Path) -> Path:
    """Write the toy recipe into `folder`."""
    path = folder / "tiny.yaml"
    write_whole(path, RECIPE.format(folder=folder))  # several processes of a launcher write and read it
    return path


def load(folder: Path, *overrides: str) -> Recipe:
    """Write and return the toy recipe, whose cache and run are in `folder`."""
    return recipes.load(write(folder), overrides)
