"""Count the parameters and the multiply-adds of students at their real sizes, without running them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fmdistill.backbones.throughput import flops
from fmdistill.backbones.timm_clip import timm_clip
from fmdistill.backbones.timm_sam import timm_sam
from fmdistill.backbones.tinyvit import tinyvit_sam
from fmdistill.backbones.tinyvit_clip import tinyvit_clip
from fmdistill.registry import UserError, suggest

KNOWN = (  # backbones that papers on small segmenters and small CLIPs use
    "repvit_m0_9", "repvit_m1_1", "efficientvit_b0", "efficientvit_b1", "fastvit_t8", "fastvit_sa12",
    "mobilenetv4_conv_small", "mobilenetv4_conv_medium", "convnext_atto", "convnext_tiny", "efficientformerv2_s0",
    "efficientformerv2_s1", "vit_tiny_patch16_224", "vit_small_patch16_224", "resnet18", "resnet50",
)  # fmt: skip
SIZES: tuple[Any, ...] = ("5m", "11m", "21m")


@dataclass(frozen=True)
class StudentSize:
    """A student's setting in a recipe, its parameters, and its multiply-adds (MACs) for one image of `side` pixels."""

    setting: str
    side: int
    parameters: int
    macs: int


def sizes(patterns: Sequence[str] = ()) -> Iterator[StudentSize]:
    """Yield the sizes of TinyViT and of well-known backbones; of the timm models that match `patterns`, if given.

    A pattern is a timm name, in which * stands for any characters. Each backbone is counted as a student of SAM
    (1024 px, 256 channels) and of CLIP (224 px, 512 dimensions), as far as it can be one. Raises UserError for a
    pattern that matches nothing.
    """
    for setting, build in _builders(patterns):
        try:
            student = build()
        except UserError:  # not every backbone gives feature maps, or fits open_clip
            continue
        yield measure(setting, student)


def measure(setting: str, student: Any) -> StudentSize:
    """Return the size of a student that states its `image_size`; nothing is computed."""
    parameters = sum(p.numel() for p in student.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(1, 3, student.image_size, student.image_size)
        return StudentSize(setting, student.image_size, parameters, flops(student.eval(), image) // 2)


def text(measured: Sequence[StudentSize]) -> str:
    """Return sizes as an aligned table."""
    cells = [("student", "image", "parameters", "MACs")]
    cells += [(s.setting, f"{s.side} px", f"{s.parameters / 1e6:.2f} M", f"{s.macs / 1e9:.2f} G") for s in measured]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return "\n".join(f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in cells)


def _builders(patterns: Sequence[str]) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    if not patterns:
        for size in SIZES:
            yield f"tinyvit_sam size={size}", partial(tinyvit_sam, size)
        for size in SIZES:
            yield f"tinyvit_clip size={size}", partial(tinyvit_clip, size)
    models = [model for pattern in patterns for model in _matching(pattern)] if patterns else KNOWN
    for model in dict.fromkeys(models):
        yield f"timm_sam model={model}", partial(timm_sam, model)
        yield f"timm_clip model={model}", partial(timm_clip, model)


def _matching(pattern: str) -> list[str]:
    matching = timm.list_models(pattern)
    if not matching:
        raise UserError(f"students {pattern}: timm has no such model.{suggest(pattern, timm.list_models())}")
    return matching
