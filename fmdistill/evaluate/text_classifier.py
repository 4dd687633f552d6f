"""Build a zero-shot classifier from class names in prompt templates, with CLIP's text tower and open_clip's builder.

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
from fmdistill.registry import UserError, parse
from fmdistill.teachers.compute import full_precision, state_hash
from fmdistill.text import read_text

IMAGENET = "imagenet"  # open_clip's 1000 class names, in the order of the sorted wnids
TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}


def class_names(setting: str | Sequence[str]) -> list[str]:
    """Return the class names in order of label: open_clip's for "imagenet", a file's lines, or a list.

    A text such as "[cat, dog]" is a list too.
    """
    names = list(open_clip.IMAGENET_CLASSNAMES) if setting == IMAGENET else _lines(setting, "classnames", IMAGENET)
    if not all(names):
        raise UserError(
            f"classnames={shown(setting)}: line {names.index('') + 1} is empty; a name's line is its label, so write a "
            f"name"
        )
    return names


def templates(setting: str | Sequence[str]) -> list[str]:
    """Return prompts with {} for the class name: open_clip's 80 ("openai") or 7 ("simple"), a file's lines or a list.

    {c} means the same as {}, as in clip_benchmark's files. A text such as "['a {}', 'the {}']" is a list too.
    """
    if isinstance(setting, str) and setting in TEMPLATES:
        return [template("{}") for template in TEMPLATES[setting]]
    prompts = [line.replace("{c}", "{}") for line in _lines(setting, "templates", "openai or simple")]
    wrong = [prompt for prompt in prompts if prompt.count("{}") != 1 or set("{}") & set(prompt.replace("{}", ""))]
    if wrong:
        raise UserError(f"templates={shown(setting)}: {wrong[0]!r} needs {{}} once, for the class name")
    return prompts


def shown(setting: str | Sequence[str]) -> str:
    """Return the setting as text for a message: a list by its first two entries."""
    if isinstance(setting, str):
        return setting
    return f"[{', '.join(setting[:2])}{', ...' if len(setting) > 2 else ''}]"


def check_classes(images: Images, classnames: str | Sequence[str], count: int) -> None:
    """Raise a UserError if class folders do not match the class names; ImageNet's must be its wnids or numbers."""
    if not isinstance(images.source, ImageClasses):
        return
    folders, root = images.source.classes, images.source.root
    if images.source.numbered:  # some numbers may be missing
        beyond = next((name for name in folders if images.source.label_of[name] >= count), None)
        if beyond is not None:
            raise UserError(
                f"images.root={root}: class folder '{beyond}' is a label, but classnames={shown(classnames)} has "
                f"{count} names, for labels 0 to {count - 1}; number the folders from 0, or give a name for each"
            )
        return
    if len(folders) != count:
        raise UserError(
            f"images.root={root}: {len(folders)} class folders, but classnames={shown(classnames)} has {count} names; "
            f"give a file of the folders' names in their sorted order with classnames=FILE"
        )
    wnids = ImageNetInfo("imagenet-1k").label_names()
    if classnames == IMAGENET and folders != wnids:
        label = next(i for i, (folder, wnid) in enumerate(zip(folders, wnids, strict=True)) if folder != wnid)
        raise UserError(
            f"images.root={root}: class folder {label} is '{folders[label]}', ImageNet-1k's is '{wnids[label]}'; "
            f"name the folders by their wnids, or give their names with classnames=FILE"
        )


def classifier(
    head: TextHead, names: Sequence[str], prompts: Sequence[str], device: torch.device, folder: Path | None
) -> Tensor:
    """Return unit columns (D, K), float32 on the CPU: each class's normalised prompt embeddings, averaged, normalised.

    The result is stored in `folder`, if given, and reused; the file's name is a hash of everything it depends on.
    """
    digest = _digest(head, names, prompts)
    path = folder / f"{digest}.safetensors" if folder is not None else None
    if path is not None and path.is_file():
        return _read(path)
    log.info("text classifier: %d names in %d prompts", len(names), len(prompts))
    model = head.text_model.to(device)
    with full_precision():
        weight_DK = open_clip.build_zero_shot_classifier(
            model, head.tokenizer, list(names), list(prompts), num_classes_per_batch=10, device=device,
            use_tqdm=len(names) * len(prompts) > 10_000,  # takes minutes without a GPU
        )  # fmt: skip
    weight_DK = weight_DK.float().cpu().contiguous()
    if path is not None and os.access(path.parent.parent, os.W_OK):  # a cache may be read-only
        path.parent.mkdir(exist_ok=True)
        write_whole(path, to_bytes({"classifier": weight_DK}))
    return weight_DK


def _digest(head: TextHead, names: Sequence[str], prompts: Sequence[str]) -> str:
    """Return a hash of the text tower, its configuration and tokenizer, the names and the prompts."""
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
        raise UserError(f"{path}: not readable ({error}); delete it, and it is rebuilt") from None


def _lines(given: str | Sequence[str], setting: str, known: str) -> list[str]:
    """Return the lines of the text file that `setting` names, or its list; `known` are its other values, for errors."""
    if isinstance(given, str) and given.startswith("[") and given.endswith("]"):
        given = parse(given, setting)  # a list on the command line
    if not isinstance(given, str):
        if not given or not all(isinstance(line, str) for line in given):
            raise UserError(f"{setting}: the list is empty, or has an entry that is no text; quote numbers")
        return [line.strip() for line in given]
    try:
        file = recipes.locate(given)
    except UserError:
        raise UserError(
            f"{setting}={given}: no such file here or in the package; give {known}, or a text file with one per "
            f"line, or a list"
        ) from None
    lines = [line.strip() for line in read_text(file, setting).rstrip().split("\n")]
    if lines == [""]:
        raise UserError(f"{setting}={given}: the file is empty; write one per line")
    return lines
