"""TinyViT as the image tower of a CLIP: timm's trunk and a linear projection, under open_clip's names."""

from typing import Any, Literal

import timm
from torch import nn

from fmdistill.backbones.timm_clip import TimmCLIP
from fmdistill.backbones.tinyvit import forget_cached_biases, load_pretrained
from fmdistill.registry import UserError


class TinyViTCLIP(TimmCLIP):
    """A `TimmCLIP` on TinyViT; `trunk` overrides settings of timm's TinyVit, such as `embed_dims`."""

    def __init__(
        self, variant: str = "tiny_vit_5m_224", embed_dim: int = 512, image_size: int = 224, **trunk: Any
    ) -> None:
        if image_size < 32 or image_size % 32:
            raise UserError(f"student.image_size={image_size}: expected a multiple of TinyViT's stride 32")
        super().__init__(variant, embed_dim, image_size, **trunk)
        self.register_load_state_dict_post_hook(forget_cached_biases)

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
