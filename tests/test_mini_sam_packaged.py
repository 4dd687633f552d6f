"""The small teacher that ships: its file, its quality, and the evaluator against SAM's own predictor on it."""

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from fmdistill import evaluate, recipe
from fmdistill.backbones.promptable import PromptHead
from fmdistill.evaluate.grid_miou import GridMiou, image_iou
from fmdistill.evaluate.results import value
from fmdistill.mini.photos import photograph
from fmdistill.mini.sam import PACKAGED, build_sam_mini, sam_mini_student
from fmdistill.mini.scene_miou import SceneMiou


def test_the_packaged_file_is_small_and_complete():
    assert PACKAGED.stat().st_size <= 8_000_000
    model = sam_mini_student("packaged")
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for p in model.parameters())


@pytest.mark.slow
def test_it_segments_unseen_scenes():
    """Far above chance on a few scenes; the figure on 500 is in docs/results.md."""
    settings = recipe.load("recipes/mini/sam_mini_scenes.yaml", ["images.validation=40", "images.seed=77"])
    rows, _ = SceneMiou().judge(settings, {"student": sam_mini_student("packaged").eval()})
    best, picked, ceiling = (value(rows, "miou", mask=mask) for mask in ("best", "picked", "ceiling"))
    assert best > FLOOR_BEST and picked > FLOOR_PICKED and ceiling > best


FLOOR_BEST, FLOOR_PICKED = 0.60, 0.53


@pytest.mark.parametrize("select", ["single", "best_predicted", "paired", "oracle"])
def test_grid_miou_equals_a_loop_over_sam_predictor(select):
    sam, image = build_sam_mini(), photograph("coffee")
    k, predictor = 3, SamPredictor(sam)
    predictor.set_image(image)
    teacher = predictor.features[0]
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(0))
    student = teacher + 0.5 * noise * teacher.std()
    sides = []
    for embedding in (teacher, student):
        predictor.features = embedding[None]
        points = [(x, y) for y in (np.arange(k) + 0.5) / k for x in (np.arange(k) + 0.5) / k]
        sides.append(
            [
                predictor.predict(
                    np.array([[x * image.shape[1], y * image.shape[0]]]),
                    np.array([1]),
                    multimask_output=select != "single",
                )
                for x, y in points
            ]
        )
    expected = [score(t, s, select) for t, s in zip(*sides, strict=True)]
    head, resized = PromptHead.from_sam(sam), tuple(predictor.input_size)
    found = image_iou(head, teacher, student, image.shape[:2], resized, k, GridMiou(select=select))
    assert abs(found.mean() - np.mean(expected)) < 1e-4
    assert 0.05 < np.mean(expected) < 0.999
    same = image_iou(head, teacher, teacher, image.shape[:2], resized, k, GridMiou(select=select))
    assert (same == 1).all()


def score(teacher, student, select: str) -> float:
    (t, t_iou, _), (s, s_iou, _) = teacher, student
    if select == "paired":
        return float(np.mean([iou(a, b) for a, b in zip(t, s, strict=True)]))
    if select == "oracle":
        return max(iou(t[t_iou.argmax()], mask) for mask in s)
    return iou(t[t_iou.argmax()], s[s_iou.argmax()])


def iou(a: np.ndarray, b: np.ndarray) -> float:
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def test_its_protocol_is_the_one_that_the_recipe_names():
    assert recipe.load("recipes/mini/sam_mini_scenes.yaml").protocols == ["eval/scene_miou.yaml"]
    assert isinstance(evaluate.load("eval/scene_miou.yaml").evaluator, SceneMiou)
