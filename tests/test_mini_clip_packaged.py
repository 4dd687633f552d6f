"""The small CLIP that ships: its file, and what it names that it never saw."""

import torch

from fmdistill import evaluate, recipe
from fmdistill.evaluate.results import value
from fmdistill.mini.clip import PACKAGED, clip_mini_student
from fmdistill.mini.colour_baseline import CaptionedZeroshot


def test_the_packaged_file_is_small_and_complete():
    assert PACKAGED.stat().st_size <= 8_000_000
    model = clip_mini_student("packaged")
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for p in model.parameters())


def test_it_names_combinations_that_it_never_saw():
    """Far above what the colour alone gives, on other images than those of docs/results.md."""
    settings = recipe.load("recipes/mini/clip_mini.yaml", ["images.validation=204", "images.seed=77"])
    evaluator = evaluate.load("eval/clip_mini_zeroshot.yaml").evaluator
    assert isinstance(evaluator, CaptionedZeroshot)
    rows, _ = evaluator.judge(settings, {"student": clip_mini_student("packaged").eval()})
    student, colour, chance = (value(rows, "top1", name) for name in ("student", "nearest colour", "chance"))
    assert student > FLOOR > 10 * colour > chance


FLOOR = 0.75
