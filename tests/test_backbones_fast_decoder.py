"""The reordered decoder equals segment_anything's, and any other decoder runs unchanged."""

import copy

import pytest
import torch

from fmdistill.backbones.fast_decoder import image_decoder, share, supported
from fmdistill.backbones.promptable import PromptHead

CONFIG = {
    "embed_dim": 32,
    "image_embedding_size": 6,
    "image_size": 96,
    "mask_in_chans": 8,
    "transformer_depth": 2,
    "mlp_dim": 48,
    "num_heads": 4,
    "iou_head_hidden_dim": 24,
    "iou_head_depth": 3,
    "num_multimask_outputs": 3,
}


def random_head(**changes) -> PromptHead:
    """Return a head whose every parameter is random: biases are initially zero and would hide a missing term."""
    torch.manual_seed(0)
    head = PromptHead.from_config(CONFIG | changes)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name and name.endswith("weight")))
    return head.eval()


def prompts(points: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(5, points, 2) * 96, torch.randint(0, 2, (5, points))


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("points", [1, 4])
@pytest.mark.parametrize("multimask", [True, False])
def test_equals_the_official_decoder(multimask, points, depth):
    head, embedding = random_head(transformer_depth=depth), torch.randn(32, 6, 6)
    where, labels = prompts(points)
    expected, expected_iou = head.decode(embedding, where, labels, multimask=multimask)
    logits, iou = image_decoder(head, embedding)(where, labels, multimask=multimask)
    assert logits.shape == expected.shape and iou.shape == expected_iou.shape
    assert expected.std() > 0.01
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(iou, expected_iou, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["boxes", "boxes and points", "masks", "boxes, points and masks"])
def test_boxes_and_masks_are_decoded_as_by_the_official_decoder(kind):
    head, embedding = random_head(), torch.randn(32, 6, 6)
    where, labels = prompts(2) if "points" in kind or kind == "masks" else (None, None)
    boxes = torch.rand(5, 2, 2).sort(1).values.flatten(1) * 96 if "boxes" in kind else None
    masks = torch.randn(5, 1, 24, 24) if "masks" in kind else None
    for multimask in (True, False):
        sparse, dense = head.prompt_encoder(None if where is None else (where, labels), boxes, masks)
        pe = head.prompt_encoder.get_dense_pe()
        expected, expected_iou = head.mask_decoder(embedding[None], pe, sparse, dense, multimask)
        logits, iou = image_decoder(head, embedding)(where, labels, boxes, masks, multimask=multimask)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(iou, expected_iou, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_parameter_matters_alike():
    """A planted change of any one parameter changes both decoders equally, so that no term is missing."""
    head, embedding, (where, labels) = random_head(), torch.randn(32, 6, 6), prompts(1)
    base = head.decode(embedding, where, labels)[0]
    moved = 0
    for parameter in head.mask_decoder.parameters():
        original = parameter.clone()
        parameter.add_(0.5 * torch.randn_like(parameter))
        expected = head.decode(embedding, where, labels)[0]
        torch.testing.assert_close(image_decoder(head, embedding)(where, labels)[0], expected, atol=2e-5, rtol=1e-4)
        moved += bool((expected - base).abs().max() > 1e-4)
        parameter.copy_(original)
    assert moved > 0.7 * len(list(head.mask_decoder.parameters()))


@torch.no_grad()
def test_one_image_serves_many_batches():
    head, embedding, (where, labels) = random_head(), torch.randn(32, 6, 6), prompts(1)
    decode = image_decoder(head, embedding)
    first = decode(where, labels)[0]
    assert torch.equal(decode(where, labels)[0], first)
    torch.testing.assert_close(decode(where[2:3], labels[2:3])[0], first[2:3], atol=1e-5, rtol=1e-5)
    assert share(head, embedding).image_NC.shape == (36, 32)


@torch.no_grad()
def test_another_decoder_runs_unchanged():
    head, embedding, (where, labels) = random_head(), torch.randn(32, 6, 6), prompts(1)
    assert supported(head.mask_decoder)
    changed = copy.deepcopy(head)
    changed.mask_decoder.output_upscaling[2] = torch.nn.ReLU()
    assert not supported(changed.mask_decoder)
    expected = changed.decode(embedding, where, labels)[0]
    assert torch.equal(image_decoder(changed, embedding)(where, labels)[0], expected)
