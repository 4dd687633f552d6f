"""Gather both towers of a CLIP student, with its teacher's text tower or its own, as networks of one output."""

# Legend: B images or texts, S the image side, L the context length, D the embedding's width.

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.backbones.clip import ClipPreprocess, TextHead, WholeClip
from fmdistill.backbones.timm_clip import TimmCLIP
from fmdistill.export.source import FinishedRun
from fmdistill.registry import UserError


class ImageNetwork(nn.Module):
    """A student whose output is its embedding alone, of length one if `unit`."""

    def __init__(self, student: nn.Module, unit: bool) -> None:
        super().__init__()
        self.student, self.unit = student, unit

    def forward(self, image_B3SS: Tensor) -> Tensor:
        """Return (B, D) of normalised images (B, 3, S, S)."""
        embedding_BD = self.student(image_B3SS)["embedding"]
        return F.normalize(embedding_BD, dim=-1) if self.unit else embedding_BD


class TextNetwork(nn.Module):
    """open_clip's text side, whose output is of length one if `unit`.

    With `length` and `end` it takes any number of tokens: fewer than `length` are padded, more are cut, and the last
    token is `end`. transformers.js cuts a long text's end token off, and pads only to the longest text of a batch.
    """

    def __init__(self, model: Any, unit: bool, length: int = 0, end: int | None = None) -> None:
        super().__init__()
        self.model, self.unit, self.length, self.end = model, unit, length, end

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Return (B, D) of token ids (B, L)."""
        if self.end is not None:
            padding_BL = torch.full_like(tokens_BL[:, :1], self.end).expand(-1, self.length)
            tokens_BL = torch.cat([tokens_BL, padding_BL], 1)[:, : self.length - 1]
            tokens_BL = torch.cat([tokens_BL, padding_BL[:, :1]], 1)
        return self.model.encode_text(tokens_BL, normalize=self.unit)


@dataclass(frozen=True)
class ClipTowers:
    """Both towers in eval mode on the CPU; `config` is that of a `TextHead`, whose vision_cfg is the student's."""

    student: nn.Module
    text_model: Any
    preprocess: ClipPreprocess
    config: Mapping[str, Any]
    tokenizer: Any
    scale: float
    dim: int

    @classmethod
    def of(cls, source: FinishedRun, format: str) -> "ClipTowers":
        """Return the towers of a run. Raises UserError if it has no text tower or its student does not fit it."""
        if source.family != "clip":
            raise UserError(
                f"{source.recipe.out}: its teacher is of the family '{source.family}' and has no text tower; {format} "
                f"exports runs that were distilled from CLIP"
            )
        student, preprocess, head = source.student, source.preprocess, source.head()
        assert isinstance(preprocess, ClipPreprocess) and isinstance(head, TextHead)
        if isinstance(student, WholeClip):
            return cls._with(student, head, preprocess, dict(student.config["model_cfg"]))
        _check(student, head, preprocess, format)
        return cls._with(student, head, preprocess, _model_cfg(student, head, preprocess))

    @classmethod
    def _with(
        cls, student: nn.Module, head: TextHead, preprocess: ClipPreprocess, model_cfg: dict[str, Any]
    ) -> "ClipTowers":
        config = {**head.config, "model_cfg": model_cfg}
        dim = int(model_cfg["embed_dim"])
        return cls(student.eval(), head.eval().text_model, preprocess, config, head.tokenizer, head.scale, dim)

    @property
    def context_length(self) -> int:
        """Return the number of tokens of a text."""
        return int(self.config["model_cfg"]["text_cfg"].get("context_length", 77))

    @property
    def causal(self) -> bool:
        """Return whether what follows a text's end token has no effect, so that any padding may follow."""
        text_cfg = self.config["model_cfg"]["text_cfg"]
        return (
            not text_cfg.get("no_causal_mask")
            and text_cfg.get("pool_type", "argmax") == "argmax"
            and not text_cfg.get("embed_cls")
            and not text_cfg.get("use_pad_mask")
            and "multimodal_cfg" not in self.config["model_cfg"]
        )


def _model_cfg(student: nn.Module, head: TextHead, preprocess: ClipPreprocess) -> dict[str, Any]:
    if isinstance(student, TimmCLIP) and student.timm_name is not None:
        return open_clip_config(student, head, preprocess)["model_cfg"]
    return {**head.config["model_cfg"], "vision_cfg": {"image_size": preprocess.image_size}}


def open_clip_config(student: TimmCLIP, head: TextHead, preprocess: ClipPreprocess) -> dict[str, Any]:
    """Return the content of open_clip_config.json: the teacher's, with the student as its image tower.

    `quick_gelu` is the text tower's; timm's models always use their own activation.
    """
    image_tower = {
        "timm_model_name": student.timm_name,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": student.image_size,
    }
    described = {**head.config["model_cfg"], "vision_cfg": image_tower}
    return {"model_cfg": described, "preprocess_cfg": open_clip_preprocess(preprocess)}


def open_clip_preprocess(preprocess: ClipPreprocess) -> dict[str, Any]:
    """Return the preprocessing as open_clip's preprocess_cfg."""
    return {
        "size": preprocess.image_size,
        "mode": "RGB",
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": preprocess.resize_mode,
    }


def _check(student: nn.Module, head: TextHead, preprocess: ClipPreprocess, format: str) -> None:
    for setting, of_student, of_teacher in (
        ("embedding has", getattr(student, "out_channels", None), head.config["model_cfg"]["embed_dim"]),
        ("image side is", getattr(student, "image_size", None), preprocess.image_size),
    ):
        if of_student != of_teacher:
            raise UserError(
                f"export {format}: the student's {setting} {of_student}, its teacher's {of_teacher}; use the cache "
                f"that the student was distilled from"
            )
