"""A classifier made of words: class names in prompt templates, through a CLIP's text tower, by open_clip's own builder.

Letters: K classes, D the shared embedding's width.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from fmdistill import recipe as recipes
from fmdistill.backbones.clip import TextHead
from fmdistill.files import write_whole
from fmdistill.images import Images
from fmdistill.images.image_classes import ImageClasses
from fmdistill.logs import log
from fmdistill.registry import UserError
from fmdistill.teachers.compute import full_precision, state_hash
from fmdistill.text import read_text

IMAGENET = "imagenet"  # open_clip's 1000 class names, in the order of the sorted wnids
TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}


def class_names(given: str) -> list[str]:
    """Return the class names, label 0 first: open_clip's for "imagenet", else the lines of the file `given`."""
    names = list(open_clip.IMAGENET_CLASSNAMES) if given == IMAGENET else _lines(given, "classnames", IMAGENET)
    if not all(names):
        raise UserError(
            f"classnames={given}: line {names.index('') + 1} is empty; the place of a name is its label, so write one"
        )
    return names


def templates(given: str | Sequence[str]) -> list[str]:
    """Return prompts with {} for the class name: open_clip's 80 ("openai") or 7 ("simple"), a file's lines or a list.

    {c} stands for {} too, as in clip_benchmark's files.
    """
    if isinstance(given, str) and given in TEMPLATES:
        return [template("{}") for template in TEMPLATES[given]]
    found = _lines(given, "templates", "openai or simple") if isinstance(given, str) else list(given)
    found = [line.replace("{c}", "{}") for line in found]
    odd = [line for line in found if line.count("{}") != 1 or set("{}") & set(line.replace("{}", ""))]
    if odd or not found:
        raise UserError(f"templates={given}: {odd[0]!r} needs {{}} once, for the class name" if odd else
                        "templates: the list is empty; give prompts such as 'a photo of a {}.'")  # fmt: skip
    return found


def check_classes(images: Images, classnames: str, count: int) -> None:
    """Raise a UserError if class folders do not fit the class names; ImageNet's must be its sorted wnids or numbers."""
    if not isinstance(images.source, ImageClasses):
        return
    folders, root = images.source.classes, images.source.root
    if images.source.numbered:  # of which some may be missing
        beyond = next((name for name in folders if images.source.label_of[name] >= count), None)
        if beyond is not None:
            raise UserError(
                f"images.root={root}: class folder '{beyond}' is a label, but classnames={classnames} has {count} "
                f"names, for labels 0 to {count - 1}; number the folders from 0, or give a name for each"
            )
        return
    if len(folders) != count:
        raise UserError(
            f"images.root={root}: {len(folders)} class folders, but classnames={classnames} has {count} names; "
            f"give a file of the folders' names in their sorted order with classnames=FILE"
        )
    wnids = ImageNetInfo("imagenet-1k").label_names()
    if classnames == IMAGENET and folders != wnids:
        place = next(i for i, (own, wnid) in enumerate(zip(folders, wnids, strict=True)) if own != wnid)
        raise UserError(
            f"images.root={root}: class folder {place} is '{folders[place]}', ImageNet-1k's is '{wnids[place]}'; "
            f"name the folders by their wnids, or give their names with classnames=FILE"
        )


def classifier(
    head: TextHead, names: Sequence[str], prompts: Sequence[str], device: torch.device, folder: Path | None
) -> Tensor:
    """Return unit columns (D, K), float32 on the CPU: each class's normalised prompt embeddings, averaged, normalised.

    Kept in `folder` under a hash of all that it depends on: text tower, its configuration, tokenizer, names, prompts.
    """
    token = _token(head, names, prompts)
    path = folder / f"{token}.safetensors" if folder is not None else None
    if path is not None and path.is_file():
        return _read(path)
    log.info("text classifier: %d names in %d prompts", len(names), len(prompts))
    model = head.text_model.to(device)
    with full_precision():
        weight_DK = open_clip.build_zero_shot_classifier(
            model, head.tokenizer, list(names), list(prompts), num_classes_per_batch=10, device=device,
            use_tqdm=len(names) * len(prompts) > 10_000,  # minutes, without a GPU
        )  # fmt: skip
    weight_DK = weight_DK.float().cpu().contiguous()
    if path is not None and os.access(path.parent.parent, os.W_OK):  # a cache may be lent for reading only
        path.parent.mkdir(exist_ok=True)
        write_whole(path, to_bytes({"classifier": weight_DK}))
    return weight_DK


def _token(head: TextHead, names: Sequence[str], prompts: Sequence[str]) -> str:
    inputs = {
        "text": state_hash(head.state_dict()),
        "config": {k: v for k, v in head.config["model_cfg"].items() if k != "vision_cfg"},
        "tokenizer": head.config["tokenizer"],
        "names": list(names),
        "prompts": list(prompts),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path) -> Tensor:
    try:
        return load_file(path)["classifier"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path}: not readable ({error}); delete it, it is made anew") from None


def _lines(path: str, where: str, known: str) -> list[str]:
    try:
        file = recipes.locate(path)
    except UserError:
        raise UserError(
            f"{where}={path}: no such file here or in the package; give {known}, or a text file of one a line"
        ) from None
    lines = [line.strip() for line in read_text(file, where).rstrip().split("\n")]
    if lines == [""]:
        raise UserError(f"{where}={path}: the file is empty; write one a line")
    return lines
