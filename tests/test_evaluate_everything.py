"""Automatic masks of students against their teacher's: the teacher against itself, and an independent recomputation."""

import annotated_toys
import numpy as np
import plain_prompts
import pytest
from pycocotools import mask as coco
from scipy.optimize import linear_sum_assignment
from segment_anything import SamAutomaticMaskGenerator

from fmdistill import evaluate, recipe
from fmdistill.evaluate.everything import Everything
from fmdistill.evaluate.results import value
from fmdistill.predict.sam import as_sam
from fmdistill.registry import UserError

IOUS = (0.97, 0.99)  # the noise changes masks by a few pixels
SETTINGS = {"points_per_side": 6, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.5}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return plain_prompts.toys(tmp_path_factory.mktemp("everything"))


@pytest.fixture(scope="module")
def models():
    return plain_prompts.models()


@pytest.fixture(scope="module")
def judged(toys, models):
    protocol = Everything(
        **SETTINGS, ious=IOUS, images=annotated_toys.source(toys), teacher=True, limit=2, device="cpu"
    )
    return protocol.judge(recipe.load("recipes/demo/sam_mse.yaml"), dict(models))


def generated(toys, model):
    """Return segment_anything's own masks of the first two pictures, as COCO's RLE."""
    sam = as_sam(model, model.head)
    generator = SamAutomaticMaskGenerator(sam, **SETTINGS, output_mode="coco_rle")
    return [
        [
            mask["segmentation"]
            for mask in generator.generate(annotated_toys.pixels(toys, {"file_name": f"{i:012d}.jpg"}))
        ]
        for i in range(2)
    ]


def test_the_teacher_against_itself_recalls_every_mask(judged):
    rows, _ = judged
    for metric, dimensions in (("recall", {"iou": IOUS[0]}), ("recall", {"iou": IOUS[1]}), ("matched_miou", {})):
        assert value(rows, metric, "packaged", **dimensions) == 1
    assert value(rows, "count_ratio", "packaged") == 1


def test_recall_and_miou_equal_those_of_segment_anything_s_own_masks(judged, toys, models):
    rows, _ = judged
    teacher, student = (generated(toys, models[name]) for name in ("packaged", "worse"))
    pairs = []
    for of, to in zip(teacher, student, strict=True):
        of_THW, to_SHW = (np.array([coco.decode(rle).astype(bool) for rle in rles]) for rles in (of, to))
        table = np.array([[plain_prompts.plain_iou(a, b) for b in to_SHW] for a in of_THW])
        paired = np.zeros(len(of))
        taken = linear_sum_assignment(-table)
        paired[taken[0]] = table[taken]
        pairs.append(paired)
    iou = np.concatenate(pairs)
    assert 4 < len(iou) and 0.02 < (iou >= IOUS[1]).mean() < 0.98, "the scores are degenerate"
    for threshold in IOUS:
        assert value(rows, "recall", "worse", iou=threshold) == pytest.approx((iou >= threshold).mean(), abs=1e-9)
    assert value(rows, "matched_miou", "worse") == pytest.approx(iou[iou >= IOUS[0]].mean(), abs=1e-3)
    counts = [sum(map(len, masks)) for masks in (student, teacher)]
    assert value(rows, "count_ratio", "worse") == pytest.approx(counts[0] / counts[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points_per_side": 0}, "points_per_side=0: needs at least 1"),
        ({"ious": (0.5, 1.5)}, r"ious=\[0.5, 1.5\]: needs IoU thresholds above 0, at most 1"),
        ({"annotations": "a.json"}, "annotations=a.json: of which format"),
        ({"truth": {"name": "teacher"}}, "truth.name=teacher: the teacher's masks are compared anyway"),
    ],
)
def test_settings_that_measure_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Everything(**settings)


@pytest.mark.parametrize("name", ["everything", "everything_lvis", "everything_mini"])
def test_the_protocols_load(name):
    assert isinstance(evaluate.load(f"eval/{name}.yaml").evaluator, Everything)
