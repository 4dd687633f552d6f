"""Masks from a run equal those of the evaluation and of segment_anything, whose code takes the student as a Sam."""

import numpy as np
import pytest
import served
import torch
from nondegenerate import randomize, tiny_sam
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from torch import nn

import fmdistill
from fmdistill.backbones.fast_decoder import image_decoder
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import SamPreprocess
from fmdistill.distill import load_student
from fmdistill.evaluate.subjects import embed
from fmdistill.mini.photos import photograph
from fmdistill.mini.sam import PACKAGED
from fmdistill.predict.sam import MaskPredictor, torch_predictor
from fmdistill.registry import UserError

SIZES = [(60, 40), (40, 60), (50, 50), (150, 90)]  # width and height


class Encoder(nn.Module):
    """segment_anything's image encoder as a student is one."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image):
        return {"embedding": self.encoder(image)}


def picture(width: int, height: int) -> np.ndarray:
    return np.array(Image.fromarray(photograph("coffee")).resize((width, height)))


@pytest.fixture(scope="module")
def sam():
    return tiny_sam(3)


@pytest.fixture
def predictor(sam):
    return torch_predictor(Encoder(sam.image_encoder), PromptHead.from_sam(sam), torch.device("cpu"))


def prompts() -> list[dict]:
    mask = np.random.default_rng(0).normal(0, 4, (1, 16, 16)).astype(np.float32)
    one, three = np.array([[20, 30]]), np.array([[20, 30], [5, 6], [30, 12]])
    box = np.array([4, 5, 30, 33])
    return [
        {"point_coords": one, "point_labels": np.array([1])},
        {"point_coords": three, "point_labels": np.array([1, 0, 1]), "multimask_output": False},
        {"box": box},
        {"point_coords": three, "point_labels": np.array([1, 0, 1]), "box": box},
        {"point_coords": one, "point_labels": np.array([1]), "mask_input": mask, "return_logits": True},
    ]


@pytest.mark.parametrize("size", SIZES)
def test_masks_equal_segment_anything_s_for_every_kind_of_prompt(sam, predictor, size):
    official = SamPredictor(sam)
    official.set_image(picture(*size))
    predictor.set_image(picture(*size))
    for prompt in prompts():
        for mine, theirs in zip(predictor.predict(**prompt), official.predict(**prompt), strict=True):
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs), prompt
    assert official.predict(**prompts()[0])[0].any()


def test_several_prompts_at_once_are_predict_torch_s(predictor):
    predictor.set_image(picture(60, 40))
    points = torch.tensor([[[20.0, 30.0]], [[40.0, 10.0]]])
    xy = predictor.transform.apply_coords_torch(points, predictor.original_size)
    masks, scores, logits = predictor.predict_torch(xy, torch.ones(2, 1))
    assert masks.shape == (2, 3, 40, 60) and scores.shape == (2, 3) and logits.shape == (2, 3, 16, 16)
    for i, point in enumerate(points):
        alone = predictor.predict(point.numpy(), [1])
        assert np.allclose(alone[2], logits[i], atol=1e-3)  # a batch adds in another order
        assert (alone[0] != masks[i].numpy()).mean() < 0.005


def test_a_path_a_pil_image_bgr_and_lists_mean_the_same(predictor, tmp_path):
    pixels = picture(60, 40)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    predictor.set_image(pixels)
    expected = predictor.predict([[20, 30]], [1], box=[4, 5, 30, 33])
    same = [
        lambda: predictor.set_image(tmp_path / "a.png"),
        lambda: predictor.set_image(str(tmp_path / "a.png")),
        lambda: predictor.set_image(Image.fromarray(pixels)),
        lambda: predictor.set_image(pixels[..., ::-1], image_format="BGR"),
    ]
    for set_image in same:
        predictor.set_image(picture(30, 50))
        set_image()
        again = predictor.predict(np.array([[20, 30]]), np.array([1]), box=np.array([4, 5, 30, 33]))
        assert all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))


def test_the_masks_of_a_run_are_those_that_its_evaluation_compares(tmp_path):
    (run,) = served.sam_runs(tmp_path, "run")
    predictor = fmdistill.load(run, device="cpu", trust=True)
    assert isinstance(predictor, MaskPredictor)
    student, head = load_student(run, trust=True), PromptHead.load(tmp_path / "cache")
    preprocess = SamPreprocess(64, 16, exact=True)
    for width, height in SIZES:
        pixels = picture(width, height)
        predictor.set_image(pixels)
        masks, scores, logits = predictor.predict([[20, 30]], [1])
        prepared, resized = preprocess.prepare(pixels)
        embedding = embed(student, preprocess, prepared[None], torch.tensor([resized]))[0]
        assert torch.equal(embedding, predictor.features[0])
        point = torch.tensor([[[20 * resized[1] / width, 30 * resized[0] / height]]])
        decoded, predicted = head.decode(embedding, point, torch.ones(1, 1))
        assert torch.equal(torch.from_numpy(logits), decoded[0]) and torch.equal(torch.from_numpy(scores), predicted[0])
        expected = head.upsample(decoded, resized, (height, width))[0] > 0
        assert np.array_equal(masks, expected.numpy()) and masks.any() and not masks.all()
        fast, _ = image_decoder(head, embedding)(point, torch.ones(1, 1))  # what grid_miou decodes with
        assert torch.allclose(fast[0], decoded[0], atol=1e-4)


def test_the_automatic_mask_generator_segments_a_photograph_with_sam_mini():
    pixels = np.array(photograph("flower"))
    sam = fmdistill.load(PACKAGED, device="cpu").as_sam()
    generator = SamAutomaticMaskGenerator(
        sam, points_per_side=6, pred_iou_thresh=0.3, stability_score_thresh=0.5, output_mode="binary_mask"
    )
    masks = generator.generate(pixels)
    assert len(masks) >= 2
    assert all(mask["segmentation"].shape == pixels.shape[:2] and mask["area"] > 0 for mask in masks)


def test_a_prompt_or_an_image_of_another_shape_is_one_line(predictor, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for image, says in (
        (np.zeros((4, 4), np.uint8), r"an array of uint8 \(4, 4\); expected uint8"),
        (np.zeros((4, 4, 3), np.float32), "an array of float32"),
        (np.zeros((0, 4, 3), np.uint8), "expected uint8"),
        (tmp_path / "a.png", "a.png: UnidentifiedImageError"),
        (tmp_path / "b.png", "b.png: cannot be read"),
        (Image.new("I;16", (4, 4)), "more than 8 bits"),
        (3, "got int"),
    ):
        with pytest.raises(UserError, match=says):
            predictor.set_image(image)
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict([[1, 1]], [1])
    predictor.set_image(picture(60, 40))
    for prompt, says in (
        ({"point_coords": [[1, 1]]}, "give both"),
        ({"point_coords": [1, 1], "point_labels": [1]}, r"point_coords of \(2,\)"),
        ({"point_coords": [[1, 1]], "point_labels": [1, 0]}, r"point_labels of \(2,\)"),
        ({"box": [[1, 1, 3, 3], [2, 2, 4, 4]]}, r"box of \(2, 4\)"),
    ):
        with pytest.raises(UserError, match=says):
            predictor.predict(**prompt)
    with pytest.raises(UserError, match="image_format='HSV'"):
        predictor.set_image(picture(60, 40), "HSV")


def test_a_student_of_another_size_than_its_head_is_refused(sam):
    class Wide(nn.Module):
        out_channels = 48

    head = PromptHead.from_sam(sam)
    with pytest.raises(UserError, match="the student's embedding has 48, but its teacher's head takes 32"):
        torch_predictor(Wide(), head, torch.device("cpu"))
    coarse = torch_predictor(Encoder(nn.Sequential(nn.Conv2d(3, 32, 32, 32))), head, torch.device("cpu"))
    with pytest.raises(UserError, match=r"gives an embedding of \(32, 2, 2\), but the teacher's head takes"):
        coarse.set_image(picture(60, 40))


@pytest.mark.slow
def test_meta_s_checkpoint_gives_segment_anything_s_masks(tmp_path):
    official = randomize(sam_model_registry["vit_b"](), 1)
    torch.save(official.state_dict(), tmp_path / "weights.pth")
    mine, theirs = fmdistill.load(tmp_path / "weights.pth", device="cpu"), SamPredictor(official)
    for predictor in (mine, theirs):
        predictor.set_image(np.array(photograph("coffee")))
    for prompt in (
        {"point_coords": np.array([[300, 200]]), "point_labels": np.array([1])},
        {"box": np.array([9, 9, 300, 250])},
    ):
        for a, b in zip(mine.predict(**prompt), theirs.predict(**prompt), strict=True):
            assert np.array_equal(a, b)
