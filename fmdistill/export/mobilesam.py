"""Write a student and its teacher's decoder as one file that MobileSAM's own code loads."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fmdistill.backbones.mobilesam_names import mobilesam_names
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.tinyvit import TinyViTSAM
from fmdistill.files import write_whole
from fmdistill.logs import log
from fmdistill.registry import UserError

CLASSES = 1000  # of the ImageNet head that MobileSAM's encoder carries and never uses
OFFICIAL = "tiny_vit_5m_224"  # the one size that MobileSAM was published in
SHAPES = Path(__file__).with_name("mobilesam_5m.json")  # of every tensor in its checkpoint, by name
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "positional_encoding_gaussian_matrix")


def export(student: nn.Module, head: PromptHead, out: Path) -> Path:
    """Write a plain state dict in MobileSAM's names to `out` and return it; a student of another kind raises.

    Every tensor is float32 on the CPU (counters stay int64); the file opens with `torch.load(weights_only=True)`.
    """
    fitting = _checked(student, head)
    state = {f"image_encoder.{name}": value for name, value in mobilesam_names(fitting.state_dict()).items()}
    state |= {f"image_encoder.{name}": value for name, value in _unused_heads(fitting.trunk.num_features).items()}
    state |= head.state_dict()  # its names are MobileSAM's: prompt_encoder. and mask_decoder.
    plain = {name: _plain(value) for name, value in state.items()}
    _check_state(fitting, plain)

    out.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(plain, buffer)  # into memory first: on a full disk it raises no OSError
    write_whole(out, buffer.getvalue())
    if fitting.image_size != 1024:
        log.warning(
            "%s: quarter scale (%d px, %d channels); MobileSAM's code is fixed to 1024 px and 256 channels, so read "
            "it back with `tinyvit_sam_mini(pretrained=...)`",
            out, fitting.image_size, fitting.out_channels,
        )  # fmt: skip
    return out


def parameters(shapes: Mapping[str, Sequence[int]]) -> int:
    """Count the parameters of a MobileSAM state by its shapes: every element outside the buffers."""
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(BUFFERS))


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of MobileSAM's checkpoint: TinyViT-5M, its unused heads, and SAM's own decoder."""
    return {name: tuple(shape) for name, shape in json.loads(SHAPES.read_text()).items()}


def _checked(student: nn.Module, head: PromptHead) -> TinyViTSAM:
    if not isinstance(student, TinyViTSAM):
        raise UserError(
            f"export mobilesam: the student is a {type(student).__name__}, MobileSAM's encoder is a TinyViT; "
            f"train a `tinyvit_sam` or choose another format"
        )
    for setting, own, theirs in (
        ("channels", student.out_channels, head.config["embed_dim"]),
        ("image size", student.image_size, head.config["image_size"]),
    ):
        if own != theirs:
            raise UserError(
                f"export mobilesam: the student's {setting} {own} is not the decoder's {theirs}; "
                f"use the cache that the student was distilled from"
            )
    return student


def _unused_heads(channels: int) -> dict[str, Tensor]:
    shapes = {
        "norm_head.weight": (channels,),
        "norm_head.bias": (channels,),
        "head.weight": (CLASSES, channels),
        "head.bias": (CLASSES,),
    }
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def _plain(value: Tensor) -> Tensor:
    value = value.detach().cpu().clone().contiguous()  # a clone shares no storage, so the file holds nothing else
    return value.float() if value.is_floating_point() else value


def _check_state(student: TinyViTSAM, state: dict[str, Tensor]) -> None:
    """Compare names and shapes with MobileSAM's; of another size of encoder, those of the decoder alone."""
    if student.image_size != 1024:
        return
    own, official = {name: tuple(value.shape) for name, value in state.items()}, official_shapes()
    if student.variant != OFFICIAL:
        log.info(
            "%s: %s parameters by MobileSAM's name map; it was published as %s (%s) only, so the encoder's shapes "
            "are not compared", student.variant, f"{parameters(own):,}", OFFICIAL, f"{parameters(official):,}",
        )  # fmt: skip
    whole = student.variant == OFFICIAL
    compared = sorted(name for name in own.keys() | official.keys() if whole or not name.startswith("image_encoder."))
    odd = [name for name in compared if own.get(name) != official.get(name)]
    if odd:
        raise UserError(
            f"export mobilesam: {len(odd)} names or shapes differ, first {odd[0]}: {own.get(odd[0], 'absent')} here, "
            f"{official.get(odd[0], 'absent')} in MobileSAM ({parameters(own):,} parameters here, "
            f"{parameters(official):,} in the 5M one); use a plain tinyvit_sam and a cache of SAM's own decoder"
        )
