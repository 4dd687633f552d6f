"""A student of sam_mini's size and its head with non-degenerate weights, to export; references in PyTorch."""

from types import SimpleNamespace

import numpy as np
import torch
from nondegenerate import randomize
from segment_anything.modeling import Sam
from segment_anything.utils.onnx import SamOnnxModel

from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.tinyvit import TinyViTSAM, tinyvit_sam
from fmdistill.export import checks
from fmdistill.export.sam_onnx import SamExport
from fmdistill.mini.tinyvit import tinyvit_sam_mini
from fmdistill.predict.sam_layouts import LAYOUTS

FULL = {
    "embed_dim": 256, "image_embedding_size": 64, "image_size": 1024, "mask_in_chans": 16, "transformer_depth": 2,
    "mlp_dim": 2048, "num_heads": 8, "iou_head_hidden_dim": 256, "iou_head_depth": 3, "num_multimask_outputs": 3,
}  # fmt: skip
MINI = FULL | {"embed_dim": 128, "image_embedding_size": 16, "image_size": 256, "mlp_dim": 128, "num_heads": 4}


def head(config: dict) -> PromptHead:
    """Return a head with non-degenerate weights; attention is smooth, else rounding in float32 decides its softmax."""
    made = randomize(PromptHead.from_config(config), 1)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                value.mul_(0.3)
    return made


def mini() -> tuple[TinyViTSAM, PromptHead]:
    """Return a quarter-scale student, 256 px, and its head."""
    return randomize(tinyvit_sam_mini()), head(MINI)


def full() -> tuple[TinyViTSAM, PromptHead]:
    """Return a TinyViT-5M at 1024 px and its head."""
    return randomize(tinyvit_sam("5m")), head(FULL)


def export(student: TinyViTSAM, prompts: PromptHead, name: str, single: bool = False) -> SamExport:
    """Return what `write` takes, with two photographs, a square and a portrait."""
    layout = LAYOUTS[name]
    layout = layout.with_single(single or layout.single)
    return SamExport(student, prompts, name, layout, lambda split, count: checks.photographs()[-2:], {"seed": 0})


def official(prompts: PromptHead, single: bool) -> SamOnnxModel:
    """Return segment_anything's own model for ONNX on the same head."""
    encoder = SimpleNamespace(img_size=prompts.config["image_size"])
    return SamOnnxModel(
        SimpleNamespace(  # type: ignore[arg-type]
            image_encoder=encoder,
            mask_decoder=prompts.mask_decoder,
            prompt_encoder=prompts.prompt_encoder,
            mask_threshold=0.0,
        ),
        single,
    )


def whole_sam(student: TinyViTSAM, prompts: PromptHead) -> Sam:
    """Return segment_anything's Sam of the student, for its SamPredictor."""

    class Encoder(torch.nn.Module):
        """The student as an image encoder."""

        img_size = student.image_size

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return student(image)["embedding"]

    return Sam(Encoder(), prompts.prompt_encoder, prompts.mask_decoder)  # type: ignore[arg-type]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean IoU of bool masks (M, H, W)."""
    both, either = (a & b).sum((1, 2)), (a | b).sum((1, 2))
    return float(np.where(either == 0, 1.0, both / np.maximum(either, 1)).mean())
