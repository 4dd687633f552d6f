"""Write a student and its mask decoder, the teacher's or its own, as one file that MobileSAM's own code loads."""

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
from fmdistill.export.source import FinishedRun
from fmdistill.files import write_whole
from fmdistill.logs import log
from fmdistill.registry import UserError

CLASSES = 1000  # of the unused ImageNet head of MobileSAM's encoder
OFFICIAL = "tiny_vit_5m_224"  # the only size in which MobileSAM was published
SHAPES = Path(__file__).with_name("mobilesam_5m.json")  # of every tensor in its checkpoint, by name
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "positional_encoding_gaussian_matrix")


def run(source: FinishedRun, out: Path) -> Path:
    """Write a SAM of the student and its decoder, in the format of MobileSAM's checkpoint."""
    source.leave_out_correction(out)
    return export(source.student, source.head(), out)


def export(student: nn.Module, head: PromptHead, out: Path) -> Path:
    """Write a plain state dict with MobileSAM's names to `out`; return `out`.

    Every tensor is float32 on the CPU (counters are int64); the file opens with `torch.load(weights_only=True)`. Raises
    UserError if the student is not a `TinyViTSAM` or does not fit the head.
    """
    tinyvit = _checked(student, head)
    state = {f"image_encoder.{name}": value for name, value in mobilesam_names(tinyvit.state_dict()).items()}
    state |= {f"image_encoder.{name}": value for name, value in _unused_heads(tinyvit.trunk.num_features).items()}
    state |= head.state_dict()  # its names begin as MobileSAM's do: prompt_encoder. and mask_decoder.
    plain = {name: _plain(value) for name, value in state.items()}
    _check_state(tinyvit, plain)

    out.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(plain, buffer)  # into memory first: on a full disk torch.save raises no OSError
    write_whole(out, buffer.getvalue())
    if tinyvit.image_size != 1024:
        log.warning(
            "%s: quarter scale (%d px, %d channels); MobileSAM's code is fixed to 1024 px and 256 channels, so load "
            "it with `tinyvit_sam_mini(pretrained=...)`",
            out, tinyvit.image_size, tinyvit.out_channels,
        )  # fmt: skip
    return out


def parameters(shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the number of parameters of a MobileSAM state with these shapes, without its buffers."""
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(BUFFERS))


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of MobileSAM's checkpoint: TinyViT-5M, its unused heads, and SAM's own decoder."""
    return {name: tuple(shape) for name, shape in json.loads(SHAPES.read_text()).items()}


def _checked(student: nn.Module, head: PromptHead) -> TinyViTSAM:
    if not isinstance(student, TinyViTSAM):
        raise UserError(
            f"export mobilesam: the student is a {type(student).__name__}, but MobileSAM's encoder is a TinyViT; "
            f"train a `tinyvit_sam` or choose another format"
        )
    for setting, of_student, of_decoder in (
        ("channels", student.out_channels, head.config["embed_dim"]),
        ("image size", student.image_size, head.config["image_size"]),
    ):
        if of_student != of_decoder:
            raise UserError(
                f"export mobilesam: the student's {setting} {of_student} is not the decoder's {of_decoder}; "
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
    value = value.detach().cpu().clone().contiguous()  # a clone shares no storage, which would be written whole
    return value.float() if value.is_floating_point() else value


def _check_state(student: TinyViTSAM, state: dict[str, Tensor]) -> None:
    """Raise a UserError if names or shapes differ from MobileSAM's; of other encoder sizes only the decoder counts."""
    if student.image_size != 1024:
        return
    own, official = {name: tuple(value.shape) for name, value in state.items()}, official_shapes()
    if student.variant != OFFICIAL:
        log.info(
            "%s: %s parameters with MobileSAM's names; MobileSAM was published as %s (%s) only, so the encoder's "
            "shapes are not compared", student.variant, f"{parameters(own):,}", OFFICIAL, f"{parameters(official):,}",
        )  # fmt: skip
    whole = student.variant == OFFICIAL
    compared = sorted(name for name in own.keys() | official.keys() if whole or not name.startswith("image_encoder."))
    differing = [name for name in compared if own.get(name) != official.get(name)]
    if differing:
        first = differing[0]
        raise UserError(
            f"export mobilesam: {len(differing)} names or shapes differ, first {first}: "
            f"{own.get(first, 'absent')} in the student, {official.get(first, 'absent')} in MobileSAM "
            f"({parameters(own):,} and {parameters(official):,} parameters); use a plain tinyvit_sam and a cache of "
            f"SAM's own decoder"
        )
