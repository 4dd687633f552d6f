"""Build an open_clip model with its weights, without executing anything that a file holds."""

import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from torch import Tensor, nn

from fmdistill.backbones.checkpoints import read_state
from fmdistill.backbones.clip_tags import (
    NOTHING_SET,
    OPENAI,
    PREPROCESSING,
    STATED,
    ClipSettings,
    file_values,
    tag_values,
    text_values,
)
from fmdistill.files import file_hash
from fmdistill.registry import UserError, suggest

LOCAL = "local-dir:"

_log = logging.getLogger(__name__)


def build_clip(model: str, pretrained: str = "none", settings: ClipSettings = NOTHING_SET) -> nn.Module:
    """Return an open_clip model in eval mode, float32, on the CPU.

    `model` is a name that open_clip knows or "local-dir:FOLDER", which contains its weights; `pretrained` is one of the
    model's tags, a checkpoint file, or "none": untrained, with the same weights at every call. Values that a file does
    not contain come from `settings`, or else from the model's tags if they agree. Raises UserError if they do not
    agree, a name is unknown, or a file is missing, damaged, not plain tensors, or another model's.
    """
    return load_clip(model, pretrained, settings)[0]


def load_clip(
    model: str, pretrained: str = "none", settings: ClipSettings = NOTHING_SET
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of `build_clip` and its configuration {"model_cfg", "preprocess_cfg", "tokenizer"}."""
    if model.startswith(LOCAL):
        if pretrained not in ("", "none"):
            raise UserError(f"teacher.pretrained={pretrained}: {model} contains its own weights; set it to none")
        if given := list(settings.given()):
            raise UserError(f"teacher.{given[0]}: {model} states it in its open_clip_config.json; remove it")
        return _from_folder(model)
    name = _open_clip_name(model)
    config: Any = open_clip.get_model_config(name)
    _check_text_tower(config, model)
    _set_text(config, settings)
    path, preprocessing, quick_gelu = _resolve(name, pretrained, config, settings)
    if path is None:
        _log.warning("%s is untrained: teacher.pretrained=none", model)
    off: dict[str, Any] = {"quick_gelu": False} if config.get("quick_gelu") and not quick_gelu else {}
    config |= {"quick_gelu": True} if quick_gelu else off
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(0)
        built = open_clip.create_model(
            name,
            force_quick_gelu=quick_gelu,
            force_preprocess_cfg=preprocessing,
            force_context_length=settings.context_length,
            pretrained_text=False,
            **off,  # open_clip has no other way to turn off the QuickGELU of a model's name
        )
    if path is not None:
        _load(built, path, pretrained, model)
    return built.eval(), _description(built, config)


def _open_clip_name(model: str) -> str:
    """Return open_clip's own spelling of a model's name."""
    name, known = model.replace("/", "-"), open_clip.list_models()
    if name not in known:
        close = suggest(name, known).partition(" Known: ")[0]  # open_clip knows more than a hundred
        raise UserError(
            f"teacher.model={model}: open_clip {open_clip.__version__} has no such model.{close} "
            f"`python -c 'import open_clip; print(open_clip.list_models())'` lists them; name a folder as "
            f"local-dir:FOLDER"
        )
    return name


def _set_text(config: dict[str, Any], settings: ClipSettings) -> None:
    text_cfg = config["text_cfg"]
    if settings.context_length is not None:
        text_cfg["context_length"] = settings.context_length
    if settings.tokenizer is not None and settings.tokenizer != text_values(config)["tokenizer"]:
        text_cfg["hf_tokenizer_name"] = None if settings.tokenizer == "simple" else settings.tokenizer
        for key in ("tokenizer_kwargs", "tokenizer_mode"):  # settings of the replaced tokenizer
            text_cfg.pop(key, None)


def _resolve(
    name: str, pretrained: str, config: Mapping[str, Any], settings: ClipSettings
) -> tuple[Path | None, dict[str, Any], bool]:
    """Return the weights' path (None if untrained), the preprocessing, and whether the model needs QuickGELU."""
    tag = get_pretrained_cfg(name, pretrained)
    if pretrained in ("", "none"):
        path, stated = None, tag_values(name, settings.as_tag, config) if settings.as_tag else {}
    elif tag:
        if settings.as_tag is not None:
            raise UserError(
                f"teacher.as_tag={settings.as_tag}: teacher.pretrained={pretrained} is a tag; remove as_tag"
            )
        path, stated = _downloaded(tag, pretrained), tag_values(name, pretrained, config)
    elif Path(pretrained).is_file():
        path = Path(pretrained)
        stated, line = file_values(name, pretrained, config, settings, path.suffix == ".pt" and is_openai(path))
        _log.info("%s", line)
    else:
        raise UserError(
            f"teacher.pretrained={pretrained}: neither a file nor a tag of {name}."
            f"{suggest(pretrained, ['none', *list_pretrained_tags_by_model(name)])}"
        )
    values = {**stated, **{key: value for key, value in settings.given().items() if key in STATED}}
    preprocessing = {key: values[key] for key in PREPROCESSING if key in values}
    return path, preprocessing, bool(values.get("quick_gelu", config.get("quick_gelu")))


def _downloaded(tag: dict[str, Any], pretrained: str) -> Path:
    try:
        return Path(download_pretrained(tag))
    except Exception as error:  # the hub's client raises classes of whichever transport it was built on
        raise UserError(
            f"teacher.pretrained={pretrained}: open_clip could not download it ({type(error).__name__}); without a "
            f"network use a checkpoint file: teacher.pretrained=FILE teacher.as_tag={pretrained}"
        ) from error


def _from_folder(model: str) -> tuple[nn.Module, dict[str, Any]]:
    folder = Path(model.removeprefix(LOCAL))
    if not (folder / "open_clip_config.json").is_file():
        raise UserError(f"teacher.model={model}: has no open_clip_config.json; name a folder that open_clip wrote")
    try:
        config: Any = open_clip.get_model_config(model)
        _check_text_tower(config, model)
        with _quiet():
            built = open_clip.create_model(model, require_pretrained=True, pretrained_text=False)
    except UserError:
        raise
    except Exception as error:  # of JSON, safetensors, pickle and torch, depending on the folder's fault
        raise UserError(f"teacher.model={model}: not a readable open_clip folder ({_reason(error)})") from error
    return built.eval(), _description(built, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Prevent open_clip from configuring the root logger and from warning about weights that are loaded later."""
    root, silent, before = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(silent)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        root.removeHandler(silent)


def _load(built: Any, path: Path, pretrained: str, model: str) -> None:
    where = f"teacher.pretrained={pretrained}"
    is_file = str(path) == pretrained
    try:
        if is_openai(path):
            built.load_state_dict(_openai_state(path))
        elif is_file and path.suffix not in (".npz", ".npy"):
            _load_state(built, read_state(path, where), where, model)
        else:  # files that open_clip publishes, and big_vision's arrays, which it reads without unpickling
            with _quiet():
                open_clip.load_checkpoint(built, str(path), weights_only=True)
    except UserError:
        raise
    except Exception as error:  # of safetensors, pickle, zip and torch, depending on the file's fault
        raise UserError(
            f"{where}: not a checkpoint of {model} ({_reason(error)}); nothing in it was executed"
        ) from error


def _load_state(built: Any, state: dict[str, Tensor], where: str, model: str) -> None:
    """Load `state` as open_clip's load_checkpoint does, but log resized image positions.

    Raises UserError if the context lengths differ.
    """
    with _quiet():
        state = convert_state_dict(built, state)
        if "positional_embedding" in state and not hasattr(built, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
    own = built.state_dict()
    for name in ("logit_scale", "logit_bias"):  # a scalar in some files, a vector of length one in others
        if name in state and name in own:
            state[name] = state[name].reshape(own[name].shape)
    if "logit_bias" in own and "logit_bias" not in state:
        state["logit_bias"] = torch.zeros_like(own["logit_bias"])
    for name in ("positional_embedding", "text.positional_embedding"):
        if name in state and name in own and len(state[name]) != len(own[name]):
            tokens = built.context_length + len(state[name]) - len(own[name])
            raise UserError(
                f"{where}: its text tower reads {tokens} tokens, {model} reads {built.context_length}; "
                f"set teacher.context_length={tokens}"
            )
    positions = len(state.get("visual.positional_embedding", ()))
    with _quiet():
        resize_pos_embed(state, built)
    built.load_state_dict(state)
    if positions != len(state.get("visual.positional_embedding", ())):
        _log.warning(
            "%s: its %d image position embeddings are resized to the %d of %s",
            where,
            positions,
            len(state["visual.positional_embedding"]),
            model,
        )


def is_openai(path: Path) -> bool:
    """Return whether `path` is a TorchScript archive that OpenAI published; its URL contains its hash."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return False
    tags = (get_pretrained_cfg(name, OPENAI) for name in open_clip.list_models())
    return file_hash(path) in {tag["url"].split("/")[-2] for tag in tags if tag and tag.get("url")}


def _openai_state(path: Path) -> dict[str, Tensor]:
    state = torch.jit.load(path, map_location="cpu").state_dict()
    sizes = ("input_resolution", "context_length", "vocab_size")
    return {name: value.float() for name, value in state.items() if name not in sizes}


def _check_text_tower(config: dict[str, Any], model: str) -> None:
    if "hf_model_name" in config["text_cfg"]:
        raise UserError(
            f"teacher.model={model}: its text tower {config['text_cfg']['hf_model_name']} is a transformers model, "
            f"which cannot be stored beside the shards; choose a model with open_clip's own text tower"
        )


def _description(built: Any, config: dict[str, Any]) -> dict[str, Any]:
    tokenizer = text_values(config)["tokenizer"]
    return {"model_cfg": config, "preprocess_cfg": dict(built.visual.preprocess_cfg), "tokenizer": tokenizer}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
