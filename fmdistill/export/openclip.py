"""Write a student and its teacher's text side as a folder that open_clip itself loads, as "local-dir:FOLDER"."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from fmdistill.backbones.clip import ClipPreprocess, TextHead, WholeClip
from fmdistill.backbones.timm_clip import TimmCLIP
from fmdistill.export import checks, clip_check
from fmdistill.export.card import write_card
from fmdistill.export.clip_towers import ClipTowers, open_clip_config, open_clip_preprocess
from fmdistill.export.folder import check_place, describe, whole_folder
from fmdistill.export.source import FinishedRun
from fmdistill.files import write_whole
from fmdistill.registry import UserError

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
WHAT = "an openclip"
PICTURES = 8


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
    tower = _checked(student, head, preprocess)
    state = {f"visual.{name}": value for name, value in tower.state_dict().items()}
    return _write(
        {**state, **head.state_dict()}, open_clip_config(tower, head, preprocess), head.tokenizer, out, source
    )


def export_whole(student: WholeClip, out: Path, source: FinishedRun | None = None) -> Path:
    """Write both towers of a student that is a whole CLIP, as `export` does."""
    described = {"model_cfg": student.config["model_cfg"], "preprocess_cfg": open_clip_preprocess(student.preprocess)}
    return _write(student.whole().state_dict(), described, None, out, source)


def _write(
    state: Mapping[str, Tensor], described: dict[str, Any], tokenizer: Any, out: Path, source: FinishedRun | None
) -> Path:
    with whole_folder(out, CONFIG, WHAT) as temporary:
        write_whole(temporary / WEIGHTS, to_bytes({name: _plain(value) for name, value in state.items()}))
        write_whole(temporary / CONFIG, json.dumps(described, indent=2) + "\n")
        if isinstance(tokenizer, HFTokenizer):  # open_clip looks for its files in the folder
            tokenizer.save_pretrained(temporary)
        model = open_clip.create_model(f"local-dir:{temporary}", require_pretrained=True, pretrained_text=False)
        if source is not None:
            check = _compare(source, model.eval())
            write_card(temporary, source, check)
            describe(
                temporary, kind="clip", format="openclip", precision="fp32", model={"runtime": "torch"}, check=check,
                source=source.to_json(),
            )  # fmt: skip
    return out


def _compare(source: FinishedRun, model: Any) -> dict[str, Any]:
    """Return the figures of open_clip's own network beside the student. Raises UserError if the embeddings differ."""
    towers = ClipTowers.of(source, "openclip")
    pictures = checks.pictures(source.recipe, "validation", PICTURES)

    @torch.no_grad()
    def embed(encode: Callable[[Tensor], Tensor], values: np.ndarray) -> np.ndarray:
        return encode(torch.from_numpy(values)).numpy()

    tokens_NL = towers.tokenizer(list(clip_check.TEXTS)).numpy()
    image, text = partial(embed, model.encode_image), partial(embed, model.encode_text)
    return clip_check.compare(towers, image, text, pictures, tokens_NL, "fp32", None)


def _checked(student: nn.Module, head: TextHead, preprocess: ClipPreprocess) -> TimmCLIP:
    if not isinstance(student, TimmCLIP):
        raise UserError(
            f"export openclip: the student is a {type(student).__name__}; open_clip builds image towers from timm by "
            f"name, so train a `tinyvit_clip` or `timm_clip`, or choose another format"
        )
    if student.timm_name is None:
        raise UserError(
            "export openclip: open_clip builds image towers from timm by name, and timm has none of this size; "
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
