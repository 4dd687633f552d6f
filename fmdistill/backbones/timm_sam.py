"""Students with SAM's interface on any backbone of timm: features of one or two strides through one neck.

Legend: B images, S the side of SAM's image, C embedding channels, c channels of a feature map.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.backbones.timm_model import check_model, pretrained_settings, without_drop_path
from fmdistill.registry import UserError

SAM_STRIDE = 16  # pixels of SAM's image in a token of its embedding


class TimmSAM(nn.Module):
    """A timm backbone as SAM's image encoder: embedding (C, S/16, S/16) of images of side S.

    The image is resized to `input_size` first if that is smaller than `image_size`, as EfficientViT-SAM does. Of each
    of the backbone's `strides` the deepest feature map is taken, brought to C channels by a 1x1 convolution and to the
    embedding's grid by bilinear interpolation, and summed; SAM's norm, 3x3 convolution and norm follow. A backbone
    without a stride is used by those of `strides` that it has, else by its deepest map.
    """

    def __init__(
        self,
        model: str,
        image_size: int = 1024,
        out_channels: int = 256,
        input_size: int | None = None,
        strides: Sequence[int] = (16, 32),
        **timm_settings: Any,
    ) -> None:
        super().__init__()
        self.model, self.image_size, self.out_channels = model, image_size, out_channels
        self.input_size, self.grid = input_size or image_size, image_size // SAM_STRIDE
        _check_sizes(self.image_size, self.input_size)
        self.trunk: Any = feature_network(model, self.input_size, strides, timm_settings)
        self.channels_last = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"
        channels = self.trunk.feature_info.channels()
        self.lateral = nn.ModuleList(nn.Conv2d(c, out_channels, 1, bias=False) for c in channels)
        self.neck = nn.Sequential(
            LayerNorm2d(out_channels, eps=1e-6),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            LayerNorm2d(out_channels, eps=1e-6),
        )

    @property
    def last_layers(self) -> dict[str, nn.Module]:
        """The last layer before each output, by the output's name; standardised targets are folded into it."""
        return {"embedding": self.neck[-1]}

    def forward(self, image_B3SS: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": (B, C, S/16, S/16)} for normalised float images (B, 3, S, S)."""
        if image_B3SS.shape[-1] != self.input_size:
            image_B3SS = F.interpolate(image_B3SS, (self.input_size, self.input_size), mode="bilinear", antialias=True)
        maps = self.trunk(image_B3SS)
        if self.channels_last:
            maps = [map_Bhwc.permute(0, 3, 1, 2) for map_Bhwc in maps]
        on_grid = [self._on_grid(lateral(map_Bchw)) for lateral, map_Bchw in zip(self.lateral, maps, strict=True)]
        return {"embedding": self.neck(torch.stack(on_grid).sum(0))}

    def _on_grid(self, map_BChw: Tensor) -> Tensor:
        if map_BChw.shape[-1] == self.grid:
            return map_BChw
        return F.interpolate(map_BChw, (self.grid, self.grid), mode="bilinear", align_corners=False)


def timm_sam(
    model: str,
    image_size: int = 1024,
    out_channels: int = 256,
    input_size: int | None = None,
    strides: tuple[int, ...] = (16, 32),
    pretrained: str = "none",
) -> TimmSAM:
    """Return a student of SAM on a timm backbone, such as `repvit_m1_1`, `efficientvit_b1` or `vit_tiny_patch16_224`.

    `image_size` and `out_channels` are the teacher's; `input_size` is the side at which the backbone sees the image,
    such as 512, and null that of the teacher. `pretrained` is "none", a timm tag such as "dist_300e_in1k" (downloaded
    once by timm), or a file of the backbone's weights under timm's names. Raises UserError if timm has no such model,
    if it makes no feature maps, or if the weights do not fit.
    """
    settings = pretrained_settings(model, pretrained)
    return TimmSAM(model, image_size, out_channels, input_size, strides, **settings)


def feature_network(model: str, side: int, strides: Sequence[int], settings: dict[str, Any]) -> nn.Module:
    """Return timm's network of feature maps for images of `side` pixels, with the deepest map of each stride.

    Raises UserError if timm has no such model, or cannot give its feature maps.
    """
    described: Any = timm.get_pretrained_cfg(check_model(model))
    if described.fixed_input_size:
        settings = {**settings, "img_size": side}
    try:
        with torch.device("meta"):
            network: Any = timm.create_model(model, features_only=True, **{**settings, "pretrained": False})
    except Exception as error:  # each of timm's models has its own
        raise UserError(
            f"student.model={model}: timm gives no feature maps of it at {side} px ({type(error).__name__}: "
            f"{str(error)[:120]}); choose another model or another student.input_size"
        ) from None
    levels = network.feature_info
    reductions = levels.reduction()
    deepest = {reduction: index for index, reduction in zip(levels.out_indices, reductions, strict=True)}
    chosen = [deepest[stride] for stride in strides if stride in deepest] or [levels.out_indices[-1]]
    network = timm.create_model(model, features_only=True, out_indices=tuple(sorted(chosen)), **settings)
    return without_drop_path(network)


def _check_sizes(image_size: int, input_size: int) -> None:
    if image_size % SAM_STRIDE or image_size < SAM_STRIDE:
        raise UserError(f"student.image_size={image_size}: expected a multiple of {SAM_STRIDE}, as SAM's side is")
    if input_size > image_size or input_size < 32 or input_size % 32:
        raise UserError(
            f"student.input_size={input_size}: expected a multiple of 32 up to image_size={image_size}, the side of "
            f"the teacher's image"
        )
