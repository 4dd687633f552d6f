"""Build sam_mini, a quarter-scale SAM of segment_anything's own classes, small enough to ship and to train on a CPU."""

import logging
from functools import partial
from pathlib import Path

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import Tensor, nn

from fmdistill.backbones.checkpoints import read_state
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import PIXEL_MEAN, PIXEL_STD, SamPreprocess
from fmdistill.distill.student import STUDENTS
from fmdistill.registry import UserError
from fmdistill.teachers.compute import DType
from fmdistill.teachers.sam import SamTeacher

IMAGE_SIZE = 256
OUT_CHANNELS = 128
PACKAGED = Path(__file__).parent / "weights" / "sam_mini.safetensors"

_log = logging.getLogger(__name__)


class MiniSam(nn.Module):
    """SAM's image encoder and prompt head as one trainable network."""

    def __init__(self, encoder: ImageEncoderViT, head: PromptHead):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.image_size, self.out_channels = head.config["image_size"], head.config["embed_dim"]
        self.preprocess = SamPreprocess(self.image_size, self.image_size // head.config["image_embedding_size"])

    def embed(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Return the image embedding (B, 128, 16, 16) of uint8 pixels (B, 3, 256, 256), sizes (B, 2) as (h, w)."""
        return self.encoder(self.preprocess.normalize(pixels, sizes))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": (B, 128, 16, 16)} of normalised images (B, 3, 256, 256)."""
        return {"embedding": self.encoder(image)}


def sam_mini_modules() -> tuple[ImageEncoderViT, PromptHead]:
    """Return sam_mini's image encoder and prompt head with fresh weights drawn from torch's generator."""
    grid = IMAGE_SIZE // 16
    encoder = ImageEncoderViT(
        img_size=IMAGE_SIZE,
        patch_size=16,
        embed_dim=192,
        depth=6,
        num_heads=3,
        mlp_ratio=4.0,
        out_chans=OUT_CHANNELS,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
        use_rel_pos=True,
        window_size=8,
        global_attn_indexes=(1, 3, 5),
    )
    assert encoder.pos_embed is not None
    # All zeros would hide positions from the ViT at the start; SAM itself starts from MAE weights.
    nn.init.trunc_normal_(encoder.pos_embed, std=0.02)
    head = PromptHead.from_config(
        {
            "embed_dim": OUT_CHANNELS,
            "image_embedding_size": grid,
            "image_size": IMAGE_SIZE,
            "mask_in_chans": 16,
            "transformer_depth": 2,
            "mlp_dim": 256,
            "num_heads": 4,
            "iou_head_hidden_dim": 64,
            "iou_head_depth": 3,
            "num_multimask_outputs": 3,
        }
    )
    return encoder, head


def sam_mini_student(pretrained: str = "none") -> MiniSam:
    """Return sam_mini for training: fresh ("none"), "packaged", or from a safetensors file."""
    model = MiniSam(*sam_mini_modules())
    if pretrained != "none":
        _load(model, PACKAGED if pretrained == "packaged" else Path(pretrained))
    return model


def build_sam_mini(weights: str | Path = "packaged") -> Sam:
    """Return sam_mini as segment_anything's Sam in eval mode; `weights` is "packaged", "none" or a safetensors file.

    Without weights ("none", or a checkout that has no packaged ones) the network is untrained and always the same.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MiniSam(*sam_mini_modules())
    if str(weights) == "packaged" and not PACKAGED.is_file():
        _log.warning("sam_mini is untrained: this checkout has no %s", PACKAGED.name)
    elif str(weights) != "none":
        _load(model, PACKAGED if str(weights) == "packaged" else Path(weights))
    sam = Sam(model.encoder, model.head.prompt_encoder, model.head.mask_decoder, list(PIXEL_MEAN), list(PIXEL_STD))
    return sam.eval()


def check_makes_masks(student: str | None, evaluator: str) -> None:
    """Raise a UserError if `student`, by its name in a recipe, is a student of the package that makes no masks."""
    if student in STUDENTS and student != "sam_mini":
        raise UserError(f"{evaluator} judges a promptable model; student.name={student} makes no masks")


def must_make_masks(model: nn.Module, student: str, evaluator: str) -> MiniSam:
    """Return the student. Raises UserError if it makes no masks."""
    if not isinstance(model, MiniSam):
        raise UserError(f"{evaluator} judges a promptable model; student.name={student} makes no masks")
    return model


def sam_mini(
    weights: str = "packaged",
    device: str = "auto",
    dtype: DType = "auto",
    batch: int = 16,
    workers: int = 2,
    exact: bool = False,
) -> SamTeacher:
    """Return sam_mini as a teacher, 256 px; `weights` is "packaged", "none", a run's folder or a safetensors file."""
    sam = build_sam_mini(Path(weights) / "student.safetensors" if Path(weights).is_dir() else weights)
    return SamTeacher(sam, name="sam_mini", device=device, dtype=dtype, batch=batch, workers=workers, exact=exact)


def _load(model: MiniSam, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"sam_mini weights {path}: no such file; use 'packaged', 'none' or a safetensors file")
    state = read_state(path, f"sam_mini weights {path}", model.state_dict().keys())
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"sam_mini weights {path}: not a sam_mini checkpoint ({reason})") from error
