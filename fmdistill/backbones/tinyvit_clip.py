"""TinyViT as the image tower of a CLIP: timm's trunk and a linear projection, under open_clip's names."""

from typing import Any, Literal

import timm
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.backbones.timm_clip import TimmCLIP
from fmdistill.backbones.tinyvit import forget_cached_biases, load_pretrained
from fmdistill.registry import UserError


class TinyViTCLIP(TimmCLIP):
    """A `TimmCLIP` on TinyViT; `trunk` overrides settings of timm's TinyVit, such as `embed_dims`.

    An image is resized to `input_size` first, if that is given. `last_stride` is the stride of the last stage's
    downsampling. open_clip's config knows neither, so `timm_name` is None if one of them is changed.
    """

    def __init__(
        self,
        variant: str = "tiny_vit_5m_224",
        embed_dim: int = 512,
        image_size: int = 224,
        input_size: int | None = None,
        last_stride: int = 2,
        **trunk: Any,
    ) -> None:
        if image_size < 32 or image_size % 32:
            raise UserError(f"student.image_size={image_size}: expected a multiple of TinyViT's stride 32")
        super().__init__(variant, embed_dim, image_size, **trunk)
        self.input_size = input_size or image_size
        self.trunk.stages[3].downsample.conv2.conv.stride = (last_stride, last_stride)
        if self.input_size != image_size or last_stride != 2:
            self.timm_name = None
        self.register_load_state_dict_post_hook(forget_cached_biases)

    def forward(self, image_B3SS: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": (B, D)}, not normalised, for normalised float images (B, 3, S, S)."""
        if image_B3SS.shape[-1] != self.input_size:
            image_B3SS = F.interpolate(image_B3SS, (self.input_size, self.input_size), mode="bilinear")
        return super().forward(image_B3SS)

    def _trunk(self, **settings: Any) -> nn.Module:
        return timm.create_model(self.variant, num_classes=0, global_pool="avg", drop_path_rate=0.0, **settings)


def tinyvit_clip(
    size: Literal["5m", "11m", "21m"] = "5m", embed_dim: int = 512, image_size: int = 224, pretrained: str = "none"
) -> TinyViTCLIP:
    """Return a full-size student; `embed_dim`, `image_size` and the input normalisation must be its teacher's.

    `pretrained` is "none", a timm tag such as "dist_in22k_ft_in1k" (downloaded once by timm), or the path of a
    .safetensors, .pth, .pt or .bin state: timm's trunk, Microsoft's TinyViT (without the last norm), an open_clip model
    with such a tower, or a student that fmdistill trained.
    """
    student = TinyViTCLIP(f"tiny_vit_{size}_224", embed_dim, image_size)
    load_pretrained(student, pretrained)
    return student
