"""Augmentation of plain images: ImageNet's crops against torchvision's, and what draws them."""

import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from fmdistill.backbones.class_preprocess import ClassPreprocess
from fmdistill.distill import tasks
from fmdistill.distill.plain import Augment, PlainImages, crop_box
from fmdistill.images import build, decode
from fmdistill.recipe import freeze
from fmdistill.registry import UserError

SIDE = 16
CUT = Augment(flip=True, resized_crop=True)


def source(folder):
    """Two classes of two noise images each for training and for validation, none of them square."""
    rng = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            noise = Image.fromarray(rng.integers(0, 256, (40, 60 + number, 3), dtype=np.uint8))
            noise.save(folder / name / f"{number}.png")
    return {"name": "image_classes", "root": str(folder / "train"), "validation_root": str(folder / "val")}


def images(folder, seed=5, **settings):
    """The training images as `PlainImages`."""
    given = {"augment": CUT, **settings}
    return PlainImages(build(source(folder)), "train", ClassPreprocess.of(SIDE, "imagenet"), seed, **given)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (300, 90), (40, 40)])
def test_boxes_are_distributed_as_torchvision_s(height, width):
    rng, image = np.random.default_rng(1), torch.zeros(1, height, width)
    torch.manual_seed(1)
    ours = np.array([crop_box(height, width, rng) for _ in range(6000)], dtype=float)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)], dtype=float
    )
    for boxes in (ours, theirs):
        assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (boxes[:, 1] + boxes[:, 3] <= width).all()
        assert (boxes[:, 2:] > 0).all() and (boxes[:, :2] >= 0).all()
    for figure in (
        lambda box: box,
        lambda box: box[:, 2:3] * box[:, 3:4] / (height * width),
        lambda box: np.log(box[:, 3:4] / box[:, 2:3]),
    ):
        one, other = figure(ours), figure(theirs)
        error = np.sqrt((one.var(0) + other.var(0)) / len(one)) + 1e-9
        assert (np.abs(one.mean(0) - other.mean(0)) < 4.5 * error).all()
        assert np.allclose(one.std(0), other.std(0), rtol=0.06, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(400, 2), (2, 400), (7, 9), (100, 75), (101, 75)])
def test_what_never_fits_gives_torchvision_s_centre(height, width):
    whole = {"scale": (9.0, 9.0), "ratio": (3 / 4, 4 / 3)}  # nine times the area fits nowhere
    ours = crop_box(height, width, np.random.default_rng(0), **whole)
    assert ours == RandomResizedCrop.get_params(torch.zeros(1, height, width), [9.0, 9.0], [3 / 4, 4 / 3])


def test_an_item_is_torchvision_s_crop_of_the_stored_image(tmp_path):
    data, flips = images(tmp_path), 0
    for epoch in range(12):
        for place in ((s, i) for s, count in enumerate(data.counts) for i in range(count)):
            found, encoded = data.item(epoch, *place), data.encoded(*place)
            rng = np.random.default_rng([5, epoch, zlib.crc32(encoded.key.encode())])
            box = crop_box(*decode(encoded.data).shape[:2], rng)
            cut = TF.resized_crop(Image.fromarray(decode(encoded.data)), *box, [SIDE, SIDE], InterpolationMode.BILINEAR)
            pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1)
            mirrored = torch.equal(found["pixels"], pixels.flip(2))
            assert mirrored or torch.equal(found["pixels"], pixels)
            assert found["labels"] == encoded.label and found["keys"] == encoded.key
            assert found["sizes"].tolist() == [SIDE, SIDE] and found["pixels"].dtype == torch.uint8
            flips += mirrored
    assert 12 < flips < 36  # of 48


def test_crops_are_drawn_from_seed_epoch_and_key(tmp_path):
    data = images(tmp_path)
    drawn = [data.item(epoch, 0, 0)["pixels"] for epoch in range(8)]
    assert all(torch.equal(one, images(tmp_path).item(epoch, 0, 0)["pixels"]) for epoch, one in enumerate(drawn))
    assert len({one.numpy().tobytes() for one in drawn}) == 8
    assert not torch.equal(images(tmp_path, 6).item(0, 0, 0)["pixels"], drawn[0])


def test_other_augmentations_draw_as_they_did():
    pixels, rng = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8), np.random.default_rng(3)
    top, left = np.random.default_rng(3).integers(0, 5, 2)
    found = Augment(crop=2)(pixels, rng)
    assert torch.equal(found, torch.nn.functional.pad(pixels, (2,) * 4)[:, top : top + 8, left : left + 8])
    assert not Augment() and Augment(resized_crop=True) and Augment(flip=True)


def test_settings_that_exclude_each_other_are_named(tmp_path):
    with pytest.raises(UserError, match=r"task\.crop=4: with task\.resized_crop"):
        Augment(crop=4, resized_crop=True)
    with pytest.raises(UserError, match=r"train\.image_memory=1\.0: with task\.resized_crop.*set it to 0"):
        images(tmp_path, memory=1.0)
    assert images(tmp_path, memory=1.0, augment=Augment(flip=True)).memory == 1.0


def test_the_task_cuts_what_trains_and_nothing_else(tmp_path):
    settings = {
        "out": str(tmp_path / "run"),
        "images": source(tmp_path),
        "student": {"name": "digits_resnet", "width": 2, "classes": 2},
        "task": {"name": "classify", "statistics": "imagenet", "resized_crop": "true"},
        "objective": {
            "label": {"output": "logits", "distance": {"name": "cross_entropy"}, "weighting": {"name": "uniform"}}
        },
        "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "constant"},
        "train": {"steps": 1, "batch_size": 2},
    }
    job = tasks.build(freeze(settings, "test"))
    assert job.train.augment == Augment(resized_crop=True) and not job.validation.augment
    first, again = job.validation.item(0, 0, 0)["pixels"], job.validation.item(1, 0, 0)["pixels"]
    assert torch.equal(first, again) and first.shape == (3, 8, 8)
    with pytest.raises(UserError, match=r"train\.image_memory=0\.5"):
        tasks.build(freeze({**settings, "train": {"steps": 1, "batch_size": 2, "image_memory": 0.5}}, "test"))
