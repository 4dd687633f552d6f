"""The fast encoder equals segment_anything's, on every path and at every shape, and no term is missing."""

import copy

import numpy as np
import pytest
import torch
from nondegenerate import randomize
from PIL import Image
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT
from torch.nn import functional as F

from fmdistill.backbones import fast_encoder
from fmdistill.backbones.fast_decoder import image_decoder
from fmdistill.backbones.fast_encoder import FastBlock, FastEncoder, supported
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import SamPreprocess
from fmdistill.mini.sam import build_sam_mini
from fmdistill.mini.scenes import Scenes, draw

SHAPES = {  # the grid is size / 16 tokens a side
    "padded windows": {},
    "whole windows": {"img_size": 96},
    "one window, larger than the grid": {"img_size": 64, "window_size": 7},
    "no windows": {"window_size": 0},
    "no relative positions": {"use_rel_pos": False},
    "no bias of queries": {"qkv_bias": False},
    "no absolute positions": {"use_abs_pos": False},
}


def encoder(**changes) -> ImageEncoderViT:
    config = {"img_size": 112, "embed_dim": 48, "depth": 4, "num_heads": 3, "mlp_ratio": 2.0, "out_chans": 16}
    config |= {"use_rel_pos": True, "window_size": 3, "global_attn_indexes": (1, 3)}
    made = randomize(ImageEncoderViT(**(config | changes)), 5)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(False)
        if "qkv" in name or "rel_pos" in name:
            parameter.mul_(5 if name.endswith("bias") else 2)  # attention far from uniform, and padding that weighs in
    return made


def images(made: ImageEncoderViT, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, made.img_size, made.img_size, generator=generator)


def gap(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("fused", [False, True])
def test_equals_segment_anything_s_encoder(changes, fused):
    made = encoder(**changes)
    x = images(made)
    expected = made(x)
    assert expected.std() > 0.1
    assert gap(FastEncoder(made, fused=fused)(x), expected) < 1e-5
    actual = FastEncoder(made, torch.bfloat16, fused)(x)
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert F.cosine_similarity(actual, expected, dim=1).min() > 0.9998


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3000, 40000])
def test_the_size_of_a_block_changes_nothing(monkeypatch, size):
    """One query row of one head at a time, several rows with a remainder, several heads with a remainder."""
    made = encoder()
    expected = made(images(made))
    monkeypatch.setattr(fast_encoder, "BLOCK_BYTES", size)
    assert gap(FastEncoder(made)(images(made)), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n, _ in encoder().named_parameters()])
def test_every_parameter_matters_alike(name):
    """A change of any one parameter changes both encoders equally, so no term is missing; the old one then differs."""
    made = encoder()
    x, before = images(made, 1), FastEncoder(copy.deepcopy(made))
    parameter = dict(made.named_parameters())[name]
    parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    expected = made(x)
    assert gap(FastEncoder(made)(x), expected) < 1e-5
    assert gap(before(x), expected) > 1e-4


@torch.no_grad()
def test_planted_errors_are_detected():
    made = encoder()
    x = images(made)
    expected = made(x)
    assert gap(FastEncoder(made)(x), expected) < 1e-5
    for change in (drop_positions, swap_axes, zero_padding, drop_scale):
        wrong = FastEncoder(made)
        for block in wrong.blocks:
            change(block)
        assert gap(wrong(x), expected) > 1e-3, change.__name__
        half = FastEncoder(made, torch.bfloat16)
        for block in half.blocks:
            change(block)
        assert F.cosine_similarity(half(x), expected, dim=1).min() < 0.9998, change.__name__


def drop_positions(block: FastBlock) -> None:
    block.tables = None


def swap_axes(block: FastBlock) -> None:
    assert block.tables is not None
    block.tables = block.tables.flip(0)


def drop_scale(block: FastBlock) -> None:
    block.scale = 1.0


def zero_padding(block: FastBlock) -> None:
    """Plant an error: padded tokens have zero as query, key and value, not the bias."""
    whole = block.qkv

    class Product(torch.nn.Module):
        bias = None

        def forward(self, x):
            return whole(x)

    block.qkv = Product()


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_as_one_graph_and_the_bias_remains_aligned():
    made = encoder()
    fast = FastEncoder(made, fused=True)
    compiled = torch.compile(fast, backend="eager", fullgraph=True, dynamic=False)
    assert gap(compiled(images(made)), made(images(made))) < 1e-5
    bias = fast_encoder._bias(torch.zeros(6, 3, 3, 3), torch.zeros(6, 3, 3, 3), torch.Size((2, 3)))
    assert bias.shape == (2, 3, 9, 9) and all(stride % 8 == 0 for stride in bias.stride()[:-1])


def test_fp32_shares_the_weights_and_bf16_does_not_change_them():
    made = encoder()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    own = {parameter.data_ptr() for parameter in made.parameters()}
    assert {parameter.data_ptr() for parameter in FastEncoder(made).parameters()} <= own
    FastEncoder(made, torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    assert supported(made) and not supported(type("Other", (ImageEncoderViT,), {})(img_size=32, depth=1))


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("dtype, least", [(torch.float32, 0.9999), (torch.bfloat16, 0.97)])
def test_sam_mini_draws_the_same_masks_from_it(dtype, least):
    """mIoU of the masks of a 4x4 grid of points on square, 3:2 and 2:3 scenes; a shifted embedding has far less."""
    sam = build_sam_mini()
    head, preprocess = PromptHead.from_sam(sam), SamPreprocess(256, 16)
    scenes = [Image.fromarray(draw(Scenes(), "validation", i).pixels) for i in (0, 1, 3, 5)]
    pixels, sizes = zip(*map(preprocess.prepare, scenes), strict=True)
    assert {(171, 256), (256, 171)} <= set(sizes)
    x = preprocess.normalize(torch.stack(pixels), torch.tensor(sizes))
    expected, actual = sam.image_encoder(x), FastEncoder(sam.image_encoder, dtype)(x)
    real = preprocess.valid(torch.tensor(sizes))
    assert F.cosine_similarity(actual, expected, dim=1)[real].min() > (0.99999 if dtype == torch.float32 else 0.99)
    assert mask_iou(head, actual, expected, sizes) >= least
    assert mask_iou(head, actual.roll(1, -1), expected, sizes) < 0.9


def mask_iou(head: PromptHead, first: torch.Tensor, other: torch.Tensor, sizes) -> float:
    ious = []
    for a, b, (height, width) in zip(first, other, sizes, strict=True):
        y, x = torch.meshgrid((torch.arange(4) + 0.5) * height / 4, (torch.arange(4) + 0.5) * width / 4, indexing="ij")
        points, labels = torch.stack([x, y], -1).reshape(16, 1, 2), torch.ones(16, 1, dtype=torch.int)
        cells = slice(int(np.ceil(height / 4))), slice(int(np.ceil(width / 4)))
        m, n = (image_decoder(head, z)(points, labels)[0][..., cells[0], cells[1]] > 0 for z in (a, b))
        both, either = (m & n).sum((-2, -1)), (m | n).sum((-2, -1))
        ious.append(torch.where(either > 0, both / either.clamp(min=1), 1.0))
    return float(torch.cat(ious).mean())


@pytest.mark.slow
@torch.inference_mode()
def test_vit_b_at_its_own_size():
    made = randomize(sam_model_registry["vit_b"](), 3).image_encoder
    x = images(made, 1)
    expected = made(x)
    assert gap(FastEncoder(made)(x), expected) < 1e-4
    assert F.cosine_similarity(FastEncoder(made, torch.bfloat16)(x), expected, dim=1).min() > 0.999
