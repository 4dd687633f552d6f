import os
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from nondegenerate import randomize, tiny_sam
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide
from torch.nn import functional as F

from fmdistill.backbones import sam as sams
from fmdistill.backbones.sam import SamPreprocess, build_sam
from fmdistill.images import decode
from fmdistill.mini.photos import photograph
from fmdistill.registry import UserError

SIZES = [(64, 64), (40, 60), (60, 40), (37, 91), (101, 33), (200, 133), (1, 64), (63, 1000), (7, 5)]


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("side", [64, 97])
def test_resize_equals_segment_anything_bit_for_bit(height, width, side):
    image = picture(height, width)
    pixels, (h, w) = SamPreprocess(side, 16).prepare(image)
    expected = torch.from_numpy(ResizeLongestSide(side).apply_image(np.asarray(image))).permute(2, 0, 1)
    assert (h, w) == tuple(expected.shape[1:])
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, side, side)
    assert torch.equal(pixels[:, :h, :w], expected)
    assert pixels[:, h:].sum() == 0 and pixels[:, :, w:].sum() == 0


LARGE = [(1, 5000), (2, 900), (300, 1000), (333, 500), (255, 257), (1, 1), (13, 29), (31, 1), (900, 3), (600, 40)]


def off(image, side):
    """Return the largest difference to the exact preprocessing; both must agree on the size and the padding."""
    exact, size = SamPreprocess(side, 16).prepare(image)
    pixels, resized = SamPreprocess(side, 16, exact=False).prepare(image)
    assert resized == size and pixels.shape == exact.shape and pixels.dtype == torch.uint8
    assert pixels.is_contiguous() and pixels[:, size[0] :].sum() == 0 and pixels[:, :, size[1] :].sum() == 0
    return (pixels.int() - exact.int()).abs().max().item()


@pytest.mark.parametrize(("height", "width"), SIZES + LARGE)
@pytest.mark.parametrize("side", [64, 97, 256])
def test_the_fast_resize_is_within_one_grey_level_of_noise(height, width, side):
    image = np.asarray(picture(height, width))
    assert off(image, side) <= 1
    assert off(np.where(image < 128, 0, 255).astype(np.uint8), side) <= 1  # overshoots would wrap around


@pytest.mark.parametrize("name", ["chelsea", "coffee", "astronaut", "coins"])
def test_the_fast_resize_is_within_one_grey_level_of_photographs_up_and_down(name):
    image = photograph(name)
    assert max(off(image, side) for side in (64, 256, 1024)) <= 1
    assert off(image[:64, :64], 64) == 0


def test_a_planted_resize_without_antialias_is_many_grey_levels_off(monkeypatch):
    real = F.interpolate
    monkeypatch.setattr(sams.F, "interpolate", lambda x, size, mode, antialias: real(x, size, mode=mode))
    assert off(photograph("coffee"), 256) > 20


@pytest.mark.skipif(not (Path(__file__).parents[2] / "shared/photos").is_dir(), reason="no other photographs here")
def test_the_fast_resize_is_within_one_grey_level_of_other_photographs():
    for path in sorted((Path(__file__).parents[2] / "shared/photos").glob("*.jpg")):
        assert off(decode(path.read_bytes()), 1024) <= 1, path


@pytest.mark.parametrize("exact", [True, False])
def test_an_image_and_any_array_of_it_have_the_same_pixels_and_are_not_changed(exact):
    preprocess, image = SamPreprocess(64, 16, exact), picture(90, 70)
    expected, size = preprocess.prepare(image)
    array = np.array(image)
    frozen, turned = array.copy(), np.ascontiguousarray(array[:, :, ::-1])[:, :, ::-1]
    frozen.setflags(write=False)
    for source in (array, frozen, turned, np.asfortranarray(array)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pixels, resized = preprocess.prepare(source)
        assert torch.equal(pixels, expected) and resized == size and np.array_equal(source, np.asarray(image))
    assert expected[:, :, 0].float().std() > 10
    grey = image.convert("L")
    assert torch.equal(preprocess.prepare(grey)[0], preprocess.prepare(np.asarray(grey))[0])
    assert torch.equal(preprocess.prepare(image.convert("RGBA"))[0], expected)
    with pytest.raises(TypeError):
        preprocess.prepare(array.astype(np.float64))


def test_normalize_equals_sam_preprocess_bit_for_bit():
    sam, preprocess = tiny_sam(), SamPreprocess(64, 16)
    prepared = [preprocess.prepare(picture(*size, seed=i)) for i, size in enumerate([(40, 60), (60, 40), (37, 91)])]
    normalized = preprocess.normalize(torch.stack([p for p, _ in prepared]), torch.tensor([s for _, s in prepared]))
    for image, (pixels, (h, w)) in zip(normalized, prepared, strict=True):
        assert torch.equal(image, sam.preprocess(pixels[:, :h, :w]))
        assert (image[:, h:] == 0).all() and (image[:, :, w:] == 0).all()
    assert normalized.dtype == torch.float32


def test_a_side_never_vanishes():
    assert SamPreprocess(64, 16).resized(3000, 1) == (64, 1)


@pytest.mark.parametrize("size", [(64, 64), (33, 64), (32, 64), (64, 1), (64, 49), (1, 64)])
def test_a_token_is_valid_if_it_contains_any_real_pixel(size):
    real = torch.zeros(64, 64)
    real[: size[0], : size[1]] = 1
    expected = torch.nn.functional.max_pool2d(real[None], 16)[0] > 0
    assert torch.equal(SamPreprocess(64, 16).valid(torch.tensor([size]))[0], expected)


def test_preprocessing_is_restored_from_json_and_any_other_description_raises():
    preprocess = SamPreprocess(256, 16)
    assert SamPreprocess.from_json(preprocess.to_json()) == preprocess and preprocess.exact
    assert preprocess.to_json()["resize"] == "longest side, PIL bilinear"  # as in the caches of version 0.1
    fast = SamPreprocess(256, 16, exact=False)
    assert SamPreprocess.from_json(fast.to_json()) == fast
    assert fast.to_json()["resize"] == "longest side, torch uint8 bilinear antialias"
    with pytest.raises(UserError, match="preprocessing"):
        SamPreprocess.from_json({**preprocess.to_json(), "resize": "squash"})


@pytest.fixture
def tiny_registry(monkeypatch):
    monkeypatch.setattr(sams, "sam_model_registry", {kind: lambda: tiny_sam(seed=1) for kind in sams.OFFICIAL})


def test_a_checkpoint_loads_every_tensor(tmp_path, tiny_registry):
    stored = tiny_sam(seed=2)
    torch.save(stored.state_dict(), tmp_path / "weights.pth")
    loaded = build_sam("vit_b", tmp_path / "weights.pth")
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, stored.state_dict()[name]), name


def message(*arguments):
    with pytest.raises(UserError) as caught:
        build_sam(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("weights", [None, "none", "absent.pth"])
def test_missing_weights_raise_an_error_with_meta_s_address(weights):
    text = message("vit_h", weights)
    assert "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth" in text
    assert "teacher.weights=PATH" in text


def test_an_unknown_kind_raises():
    assert "Did you mean 'vit_b'" in message("vitb", "x.pth")


def test_an_official_file_name_with_other_bytes_raises(tmp_path):
    path = tmp_path / "sam_vit_b_01ec64.pth"
    torch.save({"a": torch.zeros(1)}, path)
    text = message("vit_b", path)
    assert "sha256" in text and "ec2df6273261" in text and str(path) in text


def test_a_file_that_is_no_checkpoint_raises_an_error_with_its_size(tmp_path):
    path = tmp_path / "page.pth"
    path.write_bytes(b"error: no such file at this address")
    says = r"not a readable checkpoint of plain tensors \(\w+Error: .*has 35 bytes\); nothing in it was executed"
    assert re.search(says, message("vit_b", path))
    path.write_bytes(b"")
    assert re.search(r"\(EOFError.*; the file has 0 bytes\)", message("vit_b", path))


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("through_torch", [True, False])
def test_a_pickle_bomb_does_not_go_off(tmp_path, through_torch):
    target, path = tmp_path / "exploded", tmp_path / "bomb.pth"
    bomb = {"weight": Bomb(str(target))}
    torch.save(bomb, path) if through_torch else path.write_bytes(pickle.dumps(bomb))
    assert "not a readable checkpoint" in message("vit_b", path)
    assert not target.exists()
    torch.load(path, weights_only=False) if through_torch else pickle.loads(path.read_bytes())
    assert target.exists(), "the bomb must be live, else this test shows nothing"


def test_truncated_foreign_and_empty_files_raise(tmp_path, tiny_registry):
    whole = tmp_path / "whole.pth"
    torch.save(tiny_sam().state_dict(), whole)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[:-500])
    assert "cut.pth" in message("vit_b", cut)
    (tmp_path / "text.pth").write_text("404 Not Found")
    assert "text.pth" in message("vit_b", tmp_path / "text.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    assert "empty.pth" in message("vit_b", tmp_path / "empty.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "no state dict" in message("vit_b", tmp_path / "list.pth")


def test_a_checkpoint_of_another_network_raises_an_error_with_its_name(tmp_path, tiny_registry):
    path = tmp_path / "w.pth"
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 1, 1, 1024)}, path)
    assert "teacher.name=sam_vit_l" in message("vit_b", path)
    state = tiny_sam().state_dict()
    torch.save({k: v for k, v in state.items() if k != "mask_decoder.iou_token.weight"}, path)
    assert "lacks 'mask_decoder.iou_token.weight'" in message("vit_b", path)
    torch.save({**state, "extra": torch.zeros(1)}, path)
    assert "unknown 'extra'" in message("vit_b", path)
    torch.save({**state, "mask_decoder.iou_token.weight": torch.zeros(1, 7)}, path)
    assert "another shape of 'mask_decoder.iou_token.weight'" in message("vit_b", path)


def test_randomize_leaves_nothing_degenerate():
    for name, tensor in randomize(tiny_sam()).state_dict().items():
        assert (tensor != 0).all() and (tensor.numel() == 1 or tensor.std() > 0), name
