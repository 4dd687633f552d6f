"""Build TinyViT students on the scale of sam_mini and clip_mini, their teachers."""

from typing import Any

from fmdistill.backbones.tinyvit import TinyViTSAM, load_pretrained
from fmdistill.backbones.tinyvit_clip import TinyViTCLIP

SAM_TRUNK: dict[str, Any] = {
    "embed_dims": (16, 32, 80, 96),  # narrow early stages: they hold few weights and most of the time on a CPU
    "depths": (1, 1, 4, 2),
    "num_heads": (1, 1, 2, 2),
    "mbconv_expand_ratio": 2.0,
}
SHARED_WINDOWS = (8, 8, 8, 8)  # divide the grids of both teachers' students, so that one trunk serves both


def tinyvit_sam_mini(pretrained: str = "none", windows: tuple[int, ...] = (8, 8, 16, 8)) -> TinyViTSAM:
    """Return sam_mini's student: 256 px, 128 channels on a 16x16 grid; `pretrained` is "none" or a path.

    `windows` are the sides of the attention windows of the four stages, whose grids are 64, 32, 16 and 16 wide; with
    [8, 8, 8, 8] its trunk has the shapes of `tinyvit_clip_shared_mini`'s.
    """
    student = TinyViTSAM(image_size=256, out_channels=128, window_sizes=windows, **SAM_TRUNK)
    load_pretrained(student, pretrained)
    return student


def tinyvit_clip_shared_mini(embed_dim: int = 128, image_size: int = 64, pretrained: str = "none") -> TinyViTCLIP:
    """Return clip_mini's student on the trunk of tinyvit_sam_mini with windows [8, 8, 8, 8], so that both can share it.

    Images are enlarged to twice their side, since its grids of 32, 16, 8 and 8 then hold whole windows.
    """
    student = TinyViTCLIP(
        embed_dim=embed_dim,
        image_size=image_size,
        input_size=2 * image_size,
        last_stride=1,
        window_sizes=SHARED_WINDOWS,
        **SAM_TRUNK,
    )
    load_pretrained(student, pretrained)
    return student


def tinyvit_clip_mini(embed_dim: int = 128, image_size: int = 64, pretrained: str = "none") -> TinyViTCLIP:
    """Return clip_mini's student; `pretrained` is "none" or a path."""
    student = TinyViTCLIP(
        embed_dim=embed_dim,
        image_size=image_size,
        embed_dims=(32, 64, 128, 192),
        depths=(1, 1, 4, 2),
        num_heads=(1, 2, 4, 6),
        mbconv_expand_ratio=3.0,
        window_sizes=tuple(image_size // stride for stride in (4, 8, 16, 32)),  # the whole grid, so none is padding
    )
    load_pretrained(student, pretrained)
    return student
