"""The small CLIP that ships: its file, and what it names that it never saw."""

import torch

from fmdistill import evaluate, recipe
from fmdistill.backbones.clip_mini import PACKAGED, clip_mini_student
from fmdistill.evaluate import colour_baseline
from fmdistill.evaluate.colour_baseline import CaptionedZeroshot


def test_the_packaged_file_is_small_and_complete():
    assert PACKAGED.stat().st_size <= 8_000_000
    model = clip_mini_student("packaged")
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for p in model.parameters())


def test_it_names_combinations_that_it_never_saw():
    """Far above what the colour alone gives, on other images than those of docs/results.md."""
    settings = recipe.load("recipes/mini/clip_mini.yaml", ["images.validation=204", "images.seed=77"])
    protocol = evaluate.load("eval/clip_mini_zeroshot.yaml").settings
    assert isinstance(protocol, CaptionedZeroshot)
    metrics, _ = colour_baseline.judge(protocol, settings, {"student": clip_mini_student("packaged").eval()})
    assert metrics["student/top1"] > FLOOR > 10 * metrics["nearest colour/top1"] > metrics["chance/top1"]


FLOOR = 0.75
