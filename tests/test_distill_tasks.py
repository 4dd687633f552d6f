"""Task `distill` with vectors: a CLIP's embeddings teach a TinyViT through the loop that knows neither."""

import json
import math
from pathlib import Path

import clips
import pytest
import torch
from torch import nn

from fmdistill import cache, distill
from fmdistill.backbones.clip import ClipPreprocess
from fmdistill.distill import tasks
from fmdistill.distill.loader import batches
from fmdistill.distill.objective import Objective
from fmdistill.distill.student import load_student
from fmdistill.registry import UserError
from fmdistill.teachers.output import Output

SRW = {"name": "srw", "temperature": 0.1}


def load(folder: Path, *overrides: str):
    """The toy CLIP and the small TinyViT of its sizes."""
    student = ["student.name=tinyvit_clip_mini", "student.embed_dim=24", "student.image_size=32"]
    quick = ["train.batch_size=4", "train.steps=4", "train.precision=fp32", "train.device=cpu", "train.log_every=1"]
    return clips.load(folder, *student, *quick, *overrides)


def with_tokens():
    return clips.teacher(tokens=True)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A cache of eight training images and three for validation."""
    folder = tmp_path_factory.mktemp("clip")
    for name, count in (("00000", 8), ("v0", 3)):
        clips.img2dataset(folder, name, [f"{name}{n:04}" for n in range(count)])
    cache.run(load(folder))
    cache.run(load(folder, f"cache.root={folder}/tokens", "teacher.name=test_distill_tasks:with_tokens"))
    return folder


def test_a_clip_teaches_a_tinyvit_with_weights_per_image(cached):
    srw = [f"objective.embedding.weighting.{key}={value}" for key, value in SRW.items()]
    run = distill.run(load(cached, *srw, "train.accumulate=2"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "embedding", "embedding/effective_sample_size"} <= rows[0].keys()
    assert 0 < rows[0]["embedding/effective_sample_size"] < 1 < rows[0]["embedding/largest_weight"]
    assert math.isfinite(rows[-1]["validation/loss"]) and rows[3]["loss"] < rows[0]["loss"]
    student = load_student(run, trust=True)
    assert not any(module.training for module in student.modules())  # BatchNorm uses its own statistics


def test_micro_batches_are_given_what_the_step_shares_and_a_batch_alone_is_its_own_whole(cached):
    job = tasks.build(load(cached))
    assert job.shared is tasks.vectors
    batch = job.complete(next(batches(job.train, [[(0, 0, n) for n in range(4)]], 0)))
    whole = job.shared(batch)
    assert {name: tuple(value.shape) for name, value in whole.items()} == {"clip.embedding": (4, 24)}

    class Constant(nn.Module):
        def forward(self, image):
            return {"embedding": torch.ones(len(image), 24)}

    objective = Objective({"a": {"distance": {"name": "mse"}, "weighting": SRW}})
    task = tasks.Distill(Constant(), objective, ClipPreprocess(32, 8), {"clip.embedding": Output((24,))})
    assert torch.equal(task(batch)["loss"], task({**batch, "whole": whole})["loss"])
    other = {"clip.embedding": torch.cat([whole["clip.embedding"], -3 * whole["clip.embedding"][:2]])}
    assert abs(float(task(batch)["loss"] - task({**batch, "whole": other})["loss"])) > 1e-3


def test_what_does_not_fit_is_one_clear_line(cached):
    with pytest.raises(UserError, match="makes 16 dimensions at 32 px, but the cache has 24 dimensions at 32 px"):
        distill.run(load(cached, "student.embed_dim=16", f"out={cached}/narrow"))
    tokens = [f"cache.root={cached}/tokens", "teacher.name=test_distill_tasks:with_tokens"]
    with pytest.raises(
        UserError, match=r"output=tokens: the student has no such output\. Known: embedding\. Choose one of these"
    ):
        distill.run(load(cached, *tokens, "objective.embedding.output=tokens", f"out={cached}/blind"))
    with pytest.raises(
        UserError, match="feature=tokens: has one vector per patch, but output=embedding has one vector per im"
    ):
        weighting = ["objective.embedding.weighting.name=srw", "objective.embedding.weighting.feature=tokens"]
        distill.run(load(cached, *tokens, *weighting, f"out={cached}/mixed"))


def test_channels_come_last_unless_a_convolution_would_crash():
    """The last is what oneDNN's backward pass on a CPU with AVX2 alone cannot do."""
    safe = [nn.Conv2d(3, 8, 3, 2), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, 2)]
    assert tasks.memory_layout(nn.Sequential(*safe)) is torch.channels_last
    assert tasks.memory_layout(nn.Sequential(*safe, nn.Conv2d(4, 8, 1, 2))) is torch.contiguous_format


class Seeing(nn.Module):
    """A student that makes tokens as well as the embedding."""

    image_size, out_channels = 32, 24

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.proj = nn.Linear(32, 24)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"embedding": (B, 24), "tokens": (B, 32, 4, 4)}."""
        tokens = self.patches(image)
        return {"embedding": self.proj(tokens.mean((2, 3))), "tokens": tokens}


def test_tokens_are_weighed_patch_by_patch_beside_vectors_weighed_image_by_image(cached):
    tokens = [f"cache.root={cached}/tokens", "teacher.name=test_distill_tasks:with_tokens"]
    terms = [
        "objective.embedding.weighting.name=srw",
        "objective.tokens.output=tokens",
        "objective.tokens.distance.name=cosine",
        "objective.tokens.weighting.name=srw",
    ]
    recipe = clips.load(cached, *tokens, *terms, "student.name=test_distill_tasks:Seeing", f"out={cached}/both")
    run = distill.run(recipe)
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert row["loss"] == pytest.approx(row["embedding"] + row["tokens"], rel=1e-5)
    assert row["embedding/largest_weight"] > 1 and row["tokens/largest_weight"] > 1
