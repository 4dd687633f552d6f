"""All masks of an image equal those of segment_anything's own generator, in its order, with every kind of setting."""

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from pycocotools import mask as coco
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.utils.amg import batched_mask_to_box, mask_to_rle_pytorch

from fmdistill.backbones.promptable import PromptHead
from fmdistill.mini.photos import photograph
from fmdistill.mini.sam import build_sam_mini
from fmdistill.predict import everything
from fmdistill.predict.everything import MaskGenerator, masks_of_embedding

LOW = {"pred_iou_thresh": 0.15, "stability_score_thresh": 0.5}


@pytest.fixture(scope="module")
def sam():
    return build_sam_mini("packaged")


def pixels(name: str, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(photograph(name)).resize(size))


def check_equal(own: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Logits differ by rounding, so that single pixels of a mask may differ, and its stability by as much."""
    assert [mask["point_coords"] for mask in own] == [mask["point_coords"] for mask in expected]
    assert [mask["crop_box"] for mask in own] == [mask["crop_box"] for mask in expected]
    for name, tolerance in (("predicted_iou", 1e-5), ("stability_score", 1e-2)):
        np.testing.assert_allclose([m[name] for m in own], [m[name] for m in expected], atol=tolerance)
    pairs = [(a["segmentation"], b["segmentation"]) for a, b in zip(own, expected, strict=True)]
    differing = [int((coco.decode(a) != coco.decode(b)).sum()) for a, b in pairs]
    assert max(differing, default=0) <= 3 and np.count_nonzero(differing) <= 0.05 * len(pairs)
    for pixels, a, b in zip(differing, own, expected, strict=True):
        assert a["area"] == coco.area(a["segmentation"])
        assert pixels or a == {**b, "predicted_iou": a["predicted_iou"], "stability_score": a["stability_score"]}


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 0),
        ({**LOW, "box_nms_thresh": 0.9}, 1),
        ({"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}, 20),
        ({**LOW, "crop_n_layers": 1, "crop_n_points_downscale_factor": 2, "stability_score_offset": 0.5}, 1),
    ],
)
def test_masks_and_their_order_are_segment_anything_s(sam, settings, least):
    image = pixels("coins", (140, 110))
    settings = {"points_per_side": 5, "points_per_batch": 10, "output_mode": "coco_rle", **settings}
    expected = SamAutomaticMaskGenerator(sam, **settings).generate(image)
    assert len(expected) >= least
    check_equal(MaskGenerator(sam, **settings).generate(image), expected)


@pytest.mark.parametrize("name", ["flower", "coffee"])
def test_photographs_of_either_orientation_give_segment_anything_s_masks(sam, name):
    settings = {"points_per_side": 6, "output_mode": "coco_rle", "pred_iou_thresh": 0.2, "stability_score_thresh": 0.5}
    image = pixels(name, (96, 128) if name == "flower" else (150, 90))
    expected = SamAutomaticMaskGenerator(sam, **settings).generate(image)
    assert expected
    check_equal(MaskGenerator(sam, **settings).generate(image), expected)


def test_every_output_mode_is_of_the_same_masks(sam):
    image, settings = pixels("coins", (90, 70)), {"points_per_side": 4, **LOW}
    modes = ("binary_mask", "uncompressed_rle", "coco_rle")
    binary, runs, rle = (MaskGenerator(sam, output_mode=m, **settings).generate(image) for m in modes)
    assert len(binary) == len(runs) == len(rle) > 0
    for a, b, c in zip(binary, runs, rle, strict=True):
        assert (a["segmentation"] == coco.decode(c["segmentation"])).all()
        assert a["area"] == a["segmentation"].sum() == sum(b["segmentation"]["counts"][1::2])


def test_an_embedding_that_is_known_gives_the_masks_of_its_image(sam):
    image, settings = pixels("coffee", (120, 80)), {"points_per_side": 5, **LOW}
    expected = MaskGenerator(sam, **settings)
    masks = expected.generate(image)
    expected.predictor.set_image(image)
    own = masks_of_embedding(PromptHead.from_sam(sam), expected.predictor.features[0], (80, 120), **settings)
    assert len(own) == len(masks) > 0
    for a, b in zip(own, masks, strict=True):
        assert (a.pop("segmentation") == b.pop("segmentation")).all() and a == b


def test_boxes_and_runs_are_those_of_segment_anything():
    torch.manual_seed(0)
    masks = torch.rand(6, 7, 9) > 0.7
    masks[0], masks[1], masks[2] = False, True, False
    masks[2, 3, 4] = True
    masks[3, 0, 0] = True
    assert torch.equal(everything._boxes(masks), batched_mask_to_box(masks))
    assert everything._rles(masks) == mask_to_rle_pytorch(masks)
    assert torch.equal(everything._boxes(masks[:0]), batched_mask_to_box(masks[:0]).long())
    assert everything._rles(masks[:0]) == []
