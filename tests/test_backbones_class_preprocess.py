"""A classifier's preprocessing, compared with torchvision's own transforms and restored from a manifest."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from fmdistill.backbones.class_preprocess import STATISTICS, ClassPreprocess
from fmdistill.images import decode
from fmdistill.images.digits import Digits
from fmdistill.mini.photos import photograph
from fmdistill.registry import UserError


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("size", [(400, 600), (301, 40), (64, 64), (33, 100)])
def test_the_two_halves_are_torchvisions_transform(statistics, size):
    mean, std = STATISTICS[statistics]
    how = transforms.InterpolationMode.BICUBIC
    reference = transforms.Compose(
        [
            transforms.Resize(64, how),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    picture = Image.fromarray(photograph("coffee")).resize(size)
    preprocess = ClassPreprocess.of(64, statistics)
    pixels, resized = preprocess.prepare(picture)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 64, 64) and resized == (64, 64)
    assert torch.equal(preprocess.normalize(pixels[None], torch.tensor([resized]))[0], reference(picture))


def test_an_image_of_the_right_size_is_unchanged_and_grey_becomes_rgb():
    image = photograph("coffee")[:32, :32]
    assert np.array_equal(ClassPreprocess().prepare(Image.fromarray(image))[0].permute(1, 2, 0), image)
    grey = ClassPreprocess().prepare(Image.fromarray(image[..., 0]))[0]
    assert np.array_equal(grey, np.stack([image[..., 0]] * 3))


def test_it_is_restored_from_a_manifest_and_any_other_description_raises():
    preprocess = ClassPreprocess(32, 4)
    assert ClassPreprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess
    for wrong in ({"resize": "shortest, PIL bilinear"}, {"mean": None}, {"fill": 0}, {"stride": 5}):
        with pytest.raises(UserError, match="not the 'class' preprocessing"):
            ClassPreprocess.from_json({**preprocess.to_json(), **wrong})


def test_every_token_is_valid_and_by_default_an_image_is_one_token():
    sizes = torch.tensor([[32, 32], [32, 32]])
    assert ClassPreprocess(32, 4).valid(sizes).shape == (2, 8, 8) and ClassPreprocess(32, 4).valid(sizes).all()
    assert ClassPreprocess.of(8, "digits").valid(sizes).shape == (2, 1, 1)


def test_the_statistics_of_the_digits_are_those_of_all_images():
    source = Digits(validation=0)
    pixels = (
        np.stack([np.asarray(decode(e.data)) for name in source.shards()["train"] for e in source.read(name)]) / 255
    )
    assert len(pixels) == 1797
    assert (pixels.mean(), pixels.std()) == pytest.approx(
        (STATISTICS["digits"][0][0], STATISTICS["digits"][1][0]), abs=5e-4
    )


def test_a_wrong_setting_is_an_error():
    with pytest.raises(UserError, match="stride=5: expected a divisor of image_size=32"):
        ClassPreprocess(32, 5)
    with pytest.raises(UserError, match="statistics=cifar: unknown. Did you mean 'cifar100'"):
        ClassPreprocess.of(32, "cifar")
