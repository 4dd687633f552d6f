"""Build an open_clip model with its weights, without executing anything that a file holds."""

import logging
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import merge_preprocess_dict
from torch import Tensor, nn

from fmdistill.files import file_hash
from fmdistill.registry import UserError, suggest

LOCAL = "local-dir:"

_log = logging.getLogger(__name__)


def build_clip(model: str, pretrained: str = "none") -> nn.Module:
    """Return an open_clip model in eval mode, float32, on the CPU.

    `model` is a name that open_clip knows or "local-dir:FOLDER" (which brings its weights); `pretrained` is one of the
    name's tags, a checkpoint file, or "none": untrained, the same every time. A tag brings QuickGELU where its weights
    need it, as OpenAI's own files do; for another checkpoint name the "-quickgelu" model. UserError where a name is
    unknown or a file is missing, damaged, not plain tensors, or another model's.
    """
    return load_clip(model, pretrained)[0]


def load_clip(model: str, pretrained: str = "none") -> tuple[nn.Module, dict[str, Any]]:
    """Return `build_clip`'s model, and what describes it: {"model_cfg", "preprocess_cfg", "tokenizer"}."""
    if model.startswith(LOCAL):
        if pretrained not in ("", "none"):
            raise UserError(f"teacher.pretrained={pretrained}: {model} brings its own weights; set it to none")
        return _from_folder(model)
    name, quick_gelu, preprocessing, path = _resolve(model, pretrained)
    config: Any = open_clip.get_model_config(name)
    if quick_gelu:
        config["quick_gelu"] = True
    _supported(config, model)
    if path is None:
        _log.warning("%s is untrained: teacher.pretrained=none", model)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(0)
        built = open_clip.create_model(
            name, force_quick_gelu=quick_gelu, force_preprocess_cfg=preprocessing, pretrained_text=False
        )
    if path is not None:
        _load(built, path, f"teacher.pretrained={pretrained}: not a checkpoint of {model}")
    return built.eval(), _described(built, config)


def _resolve(model: str, pretrained: str) -> tuple[str, bool, dict[str, Any], Path | None]:
    """Return open_clip's name, whether the weights need QuickGELU, their preprocessing, and their file."""
    name, known = model.replace("/", "-"), open_clip.list_models()
    if name not in known:
        close = suggest(name, known).partition(" Known: ")[0]  # open_clip knows more than a hundred
        raise UserError(
            f"teacher.model={model}: open_clip {open_clip.__version__} knows no such model.{close} "
            f"`python -c 'import open_clip; print(open_clip.list_models())'` lists them; a folder is local-dir:FOLDER"
        )
    if pretrained in ("", "none"):
        return name, False, {}, None
    tag = get_pretrained_cfg(name, pretrained)
    if tag:
        try:
            path = Path(download_pretrained(tag))
        except Exception as error:  # the hub's client raises classes of whichever transport it was built on
            raise UserError(
                f"teacher.pretrained={pretrained}: open_clip could not download it ({type(error).__name__}); "
                f"without network give the path of its checkpoint file"
            ) from error
        return name, bool(tag.get("quick_gelu")), merge_preprocess_dict({}, tag), path
    if not Path(pretrained).is_file():
        raise UserError(
            f"teacher.pretrained={pretrained}: neither a file nor a tag of {model}."
            f"{suggest(pretrained, ['none', *list_pretrained_tags_by_model(name)])}"
        )
    return name, Path(pretrained).suffix == ".pt" and _is_openai(Path(pretrained)), {}, Path(pretrained)


def _from_folder(model: str) -> tuple[nn.Module, dict[str, Any]]:
    folder = Path(model.removeprefix(LOCAL))
    if not (folder / "open_clip_config.json").is_file():
        raise UserError(f"teacher.model={model}: holds no open_clip_config.json; name a folder that open_clip wrote")
    try:
        config: Any = open_clip.get_model_config(model)
        _supported(config, model)
        with _quiet():
            built = open_clip.create_model(model, require_pretrained=True, pretrained_text=False)
    except UserError:
        raise
    except Exception as error:  # of JSON, safetensors, pickle and torch, by what is wrong with the folder
        raise UserError(f"teacher.model={model}: not a readable open_clip folder ({_reason(error)})") from error
    return built.eval(), _described(built, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip, which logs to the root, from setting logging up, and from warning of weights that come later."""
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


def _load(built: Any, path: Path, problem: str) -> None:
    try:
        with _quiet():
            if _is_openai(path):
                built.load_state_dict(_openai_state(path))
            else:
                open_clip.load_checkpoint(built, str(path), weights_only=True)
    except Exception as error:  # of safetensors, pickle, zip and torch, by what is wrong with the file
        raise UserError(f"{problem} ({_reason(error)}); nothing in it was run") from error


def _is_openai(path: Path) -> bool:
    """Return whether `path` is a TorchScript archive that OpenAI published: by its hash, which its URL holds."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return False
    tags = (get_pretrained_cfg(name, "openai") for name in open_clip.list_models())
    return file_hash(path) in {tag["url"].split("/")[-2] for tag in tags if tag and tag.get("url")}


def _openai_state(path: Path) -> dict[str, Tensor]:
    state = torch.jit.load(path, map_location="cpu").state_dict()
    sizes = ("input_resolution", "context_length", "vocab_size")
    return {name: value.float() for name, value in state.items() if name not in sizes}


def _supported(config: dict[str, Any], model: str) -> None:
    if "hf_model_name" in config["text_cfg"]:
        raise UserError(
            f"teacher.model={model}: its text tower {config['text_cfg']['hf_model_name']} is a transformers model, "
            f"which cannot be kept beside the shards; choose a model with open_clip's own text tower"
        )


def _described(built: Any, config: dict[str, Any]) -> dict[str, Any]:
    tokenizer = config["text_cfg"].get("hf_tokenizer_name") or "simple"
    return {"model_cfg": config, "preprocess_cfg": dict(built.visual.preprocess_cfg), "tokenizer": tokenizer}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
