"""Image towers of a CLIP on any backbone of timm: pooled features and a linear projection, under open_clip's names.

Legend: B images, S the image side, D embedding dimensions.
"""

from collections import OrderedDict
from typing import Any

import timm
from torch import Tensor, nn

from fmdistill.backbones.timm_model import check_model, pretrained_settings, without_drop_path
from fmdistill.registry import UserError


class TimmCLIP(nn.Module):
    """An image tower equal to open_clip's `TimmModel` with `timm_pool` "avg" and `timm_proj` "linear".

    Its parameters have the names that follow "visual." in open_clip's model, and its outputs are bit-identical. The
    projection has no bias; it is part of the student and exported with it. `trunk` overrides settings of timm's model,
    such as `embed_dims`; open_clip cannot build such a trunk from a config, so `timm_name` is then None.
    """

    def __init__(self, variant: str, embed_dim: int = 512, image_size: int = 224, **trunk: Any) -> None:
        super().__init__()
        if embed_dim < 1 or image_size < 32:
            raise UserError(
                f"student.embed_dim={embed_dim}, student.image_size={image_size}: expected at least 1, and at least 32"
            )
        self.variant, self.image_size, self.out_channels = variant, image_size, embed_dim
        self.trunk_settings = {name: value for name, value in trunk.items() if not name.startswith("pretrained")}
        self.timm_name = None if self.trunk_settings else variant
        self.trunk: Any = self._trunk(**trunk)
        projection = nn.Linear(self.trunk.num_features, embed_dim, bias=False)
        self.head = nn.Sequential(OrderedDict(drop=nn.Dropout(0.0), proj=projection))

    def _trunk(self, **settings: Any) -> nn.Module:
        trunk: Any = without_drop_path(timm.create_model(self.variant, **settings))
        trunk.reset_classifier(0, global_pool="avg")
        return trunk

    @property
    def last_layers(self) -> dict[str, nn.Module]:
        """The last layer before each output, by the output's name; standardised targets are folded into it."""
        return {"embedding": self.head.get_submodule("proj")}

    def forward(self, image_B3SS: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": (B, D)}, not normalised, for normalised float images (B, 3, S, S)."""
        return {"embedding": self.head(self.trunk(image_B3SS))}


def timm_clip(model: str, embed_dim: int = 512, image_size: int = 224, pretrained: str = "none") -> TimmCLIP:
    """Return a student of CLIP on a timm backbone, such as `repvit_m1_1`, `fastvit_sa12` or `vit_tiny_patch16_224`.

    `embed_dim` and `image_size` are the teacher's. `pretrained` is "none", a timm tag such as "dist_300e_in1k"
    (downloaded once by timm), or a file of the backbone's weights under timm's names. Raises UserError if timm has no
    such model, if open_clip could not build a tower of it, or if the weights do not fit.
    """
    settings = pretrained_settings(model, pretrained)
    described: Any = timm.get_pretrained_cfg(model)
    if described.fixed_input_size and described.input_size[-1] != image_size:
        settings["img_size"] = image_size
    student = TimmCLIP(check_model(model), embed_dim, image_size, **settings)
    if (width := getattr(student.trunk, "head_hidden_size", student.trunk.num_features)) != student.trunk.num_features:
        raise UserError(
            f"student.model={model}: has a hidden layer of {width} before its classifier, which open_clip's towers of "
            f"timm's models cannot have; choose another model, such as repvit_m1_1 or fastvit_sa12"
        )
    return student
