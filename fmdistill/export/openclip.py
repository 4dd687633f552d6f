"""Write a student and its teacher's text side as a folder that open_clip itself loads, as "local-dir:FOLDER"."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from fmdistill.backbones.clip import ClipPreprocess, TextHead, WholeClip
from fmdistill.backbones.tinyvit_clip import TinyViTCLIP
from fmdistill.export.card import write_card
from fmdistill.export.folder import check_place, whole_folder
from fmdistill.export.source import FinishedRun
from fmdistill.files import write_whole
from fmdistill.registry import UserError

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
WHAT = "an openclip"


def run(source: FinishedRun, out: Path) -> Path:
    """Write a folder of the student and the teacher's text tower, which open_clip loads by local-dir:FOLDER."""
    check_place(out, CONFIG, WHAT)
    if isinstance(source.student, WholeClip):
        return export_whole(source.student, out, source)
    preprocess = source.preprocess
    if source.family != "clip" or not isinstance(preprocess, ClipPreprocess):
        raise UserError(
            f"{source.recipe.out}: its teacher is of the family '{source.family}' and has no text tower; openclip "
            f"exports runs that were distilled from CLIP"
        )
    return export(source.student, source.head(), preprocess, out, source)


def export(
    student: nn.Module, head: TextHead, preprocess: ClipPreprocess, out: Path, source: FinishedRun | None = None
) -> Path:
    """Write `out`/open_clip_config.json and open_clip_model.safetensors, float32, and a card of `source`; return `out`.

    The folder is written whole, and only if open_clip can load it. An earlier export at `out` is replaced. Raises
    UserError if `out` is anything else, or if the student does not fit.
    """
    tinyvit = _checked(student, head, preprocess)
    state = {f"visual.{name}": value for name, value in tinyvit.state_dict().items()}
    return _write({**state, **head.state_dict()}, config(tinyvit, head, preprocess), head.tokenizer, out, source)


def export_whole(student: WholeClip, out: Path, source: FinishedRun | None = None) -> Path:
    """Write both towers of a student that is a whole CLIP, as `export` does."""
    described = {"model_cfg": student.config["model_cfg"], "preprocess_cfg": _preprocess_cfg(student.preprocess)}
    return _write(student.whole().state_dict(), described, None, out, source)


def _write(
    state: Mapping[str, Tensor], described: dict[str, Any], tokenizer: Any, out: Path, source: FinishedRun | None
) -> Path:
    with whole_folder(out, CONFIG, WHAT) as temporary:
        write_whole(temporary / WEIGHTS, to_bytes({name: _plain(value) for name, value in state.items()}))
        write_whole(temporary / CONFIG, json.dumps(described, indent=2) + "\n")
        if isinstance(tokenizer, HFTokenizer):  # open_clip looks for its files in the folder
            tokenizer.save_pretrained(temporary)
        open_clip.create_model(f"local-dir:{temporary}", require_pretrained=True, pretrained_text=False)
        if source is not None:
            write_card(temporary, source, check={})
    return out


def config(student: TinyViTCLIP, head: TextHead, preprocess: ClipPreprocess) -> dict[str, Any]:
    """Return the content of open_clip_config.json: the teacher's, with the student as its image tower.

    `quick_gelu` is the text tower's; a TinyViT always uses its own GELU.
    """
    image_tower = {
        "timm_model_name": student.timm_name,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": student.image_size,
    }
    described = {**head.config["model_cfg"], "vision_cfg": image_tower}
    return {"model_cfg": described, "preprocess_cfg": _preprocess_cfg(preprocess)}


def _preprocess_cfg(preprocess: ClipPreprocess) -> dict[str, Any]:
    return {
        "size": preprocess.image_size,
        "mode": "RGB",
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": preprocess.resize_mode,
    }


def _checked(student: nn.Module, head: TextHead, preprocess: ClipPreprocess) -> TinyViTCLIP:
    if not isinstance(student, TinyViTCLIP):
        raise UserError(
            f"export openclip: the student is a {type(student).__name__}; open_clip builds image towers from timm by "
            f"name, so train a `tinyvit_clip` or choose another format"
        )
    if student.timm_name is None:
        raise UserError(
            "export openclip: open_clip builds image towers from timm by name, and timm has none of this small size; "
            "train a `tinyvit_clip`, or write the student alone with the format half"
        )
    for setting, of_student, of_teacher in (
        ("embedding has", student.out_channels, head.config["model_cfg"]["embed_dim"]),
        ("image side is", student.image_size, preprocess.image_size),
    ):
        if of_student != of_teacher:
            raise UserError(
                f"export openclip: the student's {setting} {of_student}, its teacher's {of_teacher}; use the cache "
                f"that the student was distilled from"
            )
    return student


def _plain(value: Tensor) -> Tensor:
    value = value.detach().cpu().clone().contiguous()
    return value.float() if value.is_floating_point() else value
