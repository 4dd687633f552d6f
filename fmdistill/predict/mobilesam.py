"""Build the network of a MobileSAM checkpoint of any width, whose sizes are read from the shapes of its tensors."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from fmdistill.backbones.mobilesam_names import timm_names
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.tinyvit import TinyViTSAM
from fmdistill.predict.sam import as_sam
from fmdistill.registry import UserError

ENCODER, HEAD = "image_encoder.", ("prompt_encoder.", "mask_decoder.")
MARK = f"{ENCODER}patch_embed.seq.0.c.weight"  # a tensor that every MobileSAM has, and no other SAM
PUBLISHED_WINDOW, PUBLISHED_SIDE, STRIDE = 14, 1024, 16
CHANNELS_OF_A_HEAD = 32  # of the decoder's attention, as in SAM and sam_mini
VARIANTS: dict[tuple[int, ...], str] = {  # timm's name by the widths of the stages
    (64, 128, 160, 320): "tiny_vit_5m_224",
    (64, 128, 256, 448): "tiny_vit_11m_224",
    (96, 192, 384, 576): "tiny_vit_21m_224",
}


def sam_of_state(state: Mapping[str, Tensor], where: str) -> Sam:
    """Return segment_anything's Sam of a MobileSAM checkpoint, in eval mode.

    Three sizes are in no tensor. The image's side is 1024 px if the third stage has MobileSAM's windows of 14, else 16
    times its window, which then is the stage's whole grid, as in fmdistill's quarter-scale student. An attention head
    has 32 channels in the decoder. Raises UserError, which begins with `where`, if the tensors do not fit together.
    """
    encoder = timm_names({k.removeprefix(ENCODER): v for k, v in state.items() if k.startswith(ENCODER)})
    decoder = {name: value for name, value in state.items() if name.startswith(HEAD)}
    try:
        student = TinyViTSAM(**student_sizes(encoder))
        head = PromptHead.from_config(head_sizes(decoder, student.image_size))
    except (KeyError, IndexError, ValueError, ZeroDivisionError, RuntimeError, AssertionError) as error:
        raise UserError(f"{where}: not a MobileSAM checkpoint, its sizes cannot be told ({error!r:.120})") from None
    _load(student, encoder, where)
    _load(head, decoder, where)
    return as_sam(student, head)


def student_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of the `TinyViTSAM` with this state, whose names are timm's."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    widths = (shapes["trunk.patch_embed.conv2.conv.weight"][0],)
    widths += tuple(shapes[f"trunk.stages.{i}.downsample.conv3.conv.weight"][0] for i in (1, 2, 3))
    biases = [shapes[f"trunk.stages.{i}.blocks.0.attn.attention_biases"] for i in (1, 2, 3)]
    windows = tuple(round(offsets**0.5) for _, offsets in biases)
    whole_grid = windows[1] != PUBLISHED_WINDOW
    return {
        "variant": VARIANTS.get(widths, "tiny_vit_5m_224"),
        "image_size": STRIDE * windows[1] if whole_grid else PUBLISHED_SIDE,
        "out_channels": shapes["neck.0.weight"][0],
        "embed_dims": widths,
        "depths": tuple(_count(shapes, rf"trunk\.stages\.{i}\.blocks\.(\d+)\.") for i in range(4)),
        "num_heads": (1, *(heads for heads, _ in biases)),  # the first stage has no attention
        "window_sizes": (windows[0], *windows),
        "mbconv_expand_ratio": shapes["trunk.stages.0.blocks.0.conv1.conv.weight"][0] / widths[0],
    }


def head_sizes(state: Mapping[str, Tensor], image_size: int) -> dict[str, int]:
    """Return the `PromptHead` configuration of this state, for an encoder of images of `image_size` pixels."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    width = shapes["mask_decoder.iou_token.weight"][1]
    return {
        "embed_dim": width,
        "image_embedding_size": image_size // STRIDE,
        "image_size": image_size,
        "mask_in_chans": shapes["prompt_encoder.mask_downscaling.3.weight"][0],
        "transformer_depth": _count(shapes, r"mask_decoder\.transformer\.layers\.(\d+)\."),
        "mlp_dim": shapes["mask_decoder.transformer.layers.0.mlp.lin1.weight"][0],
        "num_heads": max(1, width // CHANNELS_OF_A_HEAD),
        "iou_head_hidden_dim": shapes["mask_decoder.iou_prediction_head.layers.0.weight"][0],
        "iou_head_depth": _count(shapes, r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
        "num_multimask_outputs": shapes["mask_decoder.mask_tokens.weight"][0] - 1,
    }


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in shapes if (match := re.match(pattern, name)))


def _load(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    try:
        with torch.no_grad():
            module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: not a MobileSAM checkpoint ({reason})") from None
