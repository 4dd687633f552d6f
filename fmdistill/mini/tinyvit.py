"""Build TinyViT students on the scale of sam_mini and clip_mini, their teachers."""

from fmdistill.backbones.tinyvit import TinyViTSAM, load_pretrained
from fmdistill.backbones.tinyvit_clip import TinyViTCLIP


def tinyvit_sam_mini(pretrained: str = "none") -> TinyViTSAM:
    """Return sam_mini's student: 256 px, 128 channels on a 16x16 grid; `pretrained` is "none" or a path."""
    student = TinyViTSAM(
        image_size=256,
        out_channels=128,
        embed_dims=(16, 32, 80, 96),  # narrow early stages: they hold few weights and most of the time on a CPU
        depths=(1, 1, 4, 2),
        num_heads=(1, 1, 2, 2),
        mbconv_expand_ratio=2.0,
        window_sizes=(8, 8, 16, 8),  # divide the 32x32 and 16x16 grids, so no window is padding
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
