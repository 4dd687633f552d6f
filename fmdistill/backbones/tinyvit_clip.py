"""TinyViT as the image tower of a CLIP: timm's trunk and a linear projection, under open_clip's names.

Legend: B images, S the image side, D embedding dimensions.
"""

from collections import OrderedDict
from typing import Any, Literal

import timm
from torch import Tensor, nn

from fmdistill.backbones.tinyvit import forget_cached_biases, load_pretrained
from fmdistill.registry import UserError


class TinyViTCLIP(nn.Module):
    """An image tower equal to open_clip's `TimmModel` with `timm_pool` "avg" and `timm_proj` "linear".

    Its parameters have the names that follow "visual." in open_clip's model, and its outputs are bit-identical. The
    projection has no bias; it is part of the student and exported with it. `trunk` overrides settings of timm's
    TinyVit, such as `embed_dims`; open_clip cannot build such a trunk from a config, so `timm_name` is then None.
    """

    def __init__(
        self, variant: str = "tiny_vit_5m_224", embed_dim: int = 512, image_size: int = 224, **trunk: Any
    ) -> None:
        super().__init__()
        if embed_dim < 1 or image_size < 32 or image_size % 32:
            raise UserError(
                f"student.embed_dim={embed_dim}, student.image_size={image_size}: "
                f"expected at least 1, and a multiple of TinyViT's stride 32"
            )
        self.variant, self.image_size, self.out_channels = variant, image_size, embed_dim
        self.timm_name, self.trunk_settings = None if trunk else variant, trunk
        self.trunk: Any = timm.create_model(variant, num_classes=0, global_pool="avg", drop_path_rate=0.0, **trunk)
        projection = nn.Linear(self.trunk.num_features, embed_dim, bias=False)
        self.head = nn.Sequential(OrderedDict(drop=nn.Dropout(0.0), proj=projection))
        self.register_load_state_dict_post_hook(forget_cached_biases)

    def forward(self, image_B3SS: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": (B, D)}, not normalised, for normalised float images (B, 3, S, S)."""
        return {"embedding": self.head(self.trunk(image_B3SS))}


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
