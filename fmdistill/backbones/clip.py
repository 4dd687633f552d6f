"""open_clip's evaluation transform, split into a CPU and a device half, and CLIP's text side, stored beside shards."""

# Legend: B images, N texts, S the square's side, g = S / stride tokens per side, D the shared embedding's width.

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from fmdistill.backbones.clip_tags import INTERPOLATIONS, RESIZE_MODES
from fmdistill.backbones.clip_weights import build_clip, load_clip
from fmdistill.backbones.pixels import Picture, all_valid, as_image, standardise
from fmdistill.files import write_whole
from fmdistill.registry import UserError, suggest

__all__ = ["ClipPreprocess", "TextHead", "WholeClip", "build_clip", "load_clip"]

_FILTERS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
_TINY_TOWER = {"image_size": 32, "patch_size": 32, "width": 64, "layers": 1}  # deleted after the model is built


@dataclass(frozen=True)
class ClipPreprocess:
    """open_clip's evaluation transform: resizes the shortest side to S and crops the centre.

    With `resize_mode` "squash", both sides are resized to S. `stride` is the image tower's patch side, so that `valid`
    has its grid. Source: open_clip transform.py.
    """

    image_size: int = 224
    stride: int = 32
    mean: tuple[float, float, float] = OPENAI_DATASET_MEAN
    std: tuple[float, float, float] = OPENAI_DATASET_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(f"preprocessing interpolation={self.interpolation}{suggest('', INTERPOLATIONS)}")
        if self.resize_mode not in RESIZE_MODES:
            raise UserError(f"preprocessing resize_mode={self.resize_mode}{suggest('', RESIZE_MODES)}")

    def prepare(self, image: Picture) -> tuple[Tensor, tuple[int, int]]:
        """Return uint8 pixels (3, S, S) in RGB and (S, S); every pixel is real."""
        size, interpolation = self.image_size, _FILTERS[self.interpolation]
        sides = [size, size] if self.resize_mode == "squash" else [size]  # one number: torchvision's shortest side
        resized: Any = TF.resize(as_image(image), sides, interpolation)  # type: ignore[arg-type]
        cropped: Any = TF.center_crop(resized, [size, size])
        return torch.from_numpy(np.asarray(cropped.convert("RGB")).copy()).permute(2, 0, 1).contiguous(), (size, size)

    def normalize(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Return uint8 pixels (B, 3, S, S) as float32 (x / 255 - mean) / std, by torchvision's arithmetic."""
        return standardise(pixels, self.mean, self.std)

    def valid(self, sizes: Tensor) -> Tensor:
        """Return bool (B, g, g), all True: a crop has no padding."""
        return all_valid(sizes, self.image_size // self.stride)

    def to_json(self) -> dict[str, Any]:
        """Return what determines the network's input, for a manifest."""
        return {
            "name": "clip",
            "image_size": self.image_size,
            "stride": self.stride,
            "resize": f"{self.resize_mode}, PIL {self.interpolation}",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "ClipPreprocess":
        """Return the preprocessing that `to_json` described. Raises UserError for any other description."""
        try:
            mode, _, interpolation = str(stored["resize"]).partition(", PIL ")
            size, stride = int(stored["image_size"]), int(stored["stride"])
            made = cls(size, stride, tuple(stored["mean"]), tuple(stored["std"]), interpolation, mode)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"preprocessing {dict(stored)!r}: not the 'clip' preprocessing ({error})") from None
        if made.to_json() != dict(stored):
            raise UserError(f"preprocessing {dict(stored)!r}: not the 'clip' preprocessing of this version")
        return made

    @classmethod
    def from_config(cls, preprocess_cfg: Mapping[str, Any], stride: int) -> "ClipPreprocess":
        """Return the preprocessing of an open_clip `preprocess_cfg`. Raises UserError if it is not supported."""
        size = preprocess_cfg["size"]
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) != 1:
            raise UserError(f"preprocessing size={size}: only squares are supported; use a model of square images")
        interpolation = preprocess_cfg.get("interpolation", "bicubic")
        return cls(
            int(sides.pop()),
            stride,
            tuple(float(x) for x in preprocess_cfg.get("mean", OPENAI_DATASET_MEAN)),  # type: ignore[arg-type]
            tuple(float(x) for x in preprocess_cfg.get("std", OPENAI_DATASET_STD)),  # type: ignore[arg-type]
            "bicubic" if interpolation == "random" else interpolation,  # as open_clip's evaluation does
            preprocess_cfg.get("resize_mode", "shortest"),
        )


class TextHead(nn.Module):
    """CLIP without its image tower: text tower, logit scale and tokenizer, with open_clip's parameter names.

    `config` is {"model_cfg", "preprocess_cfg"} as in an open_clip_config.json, and "tokenizer": "simple" or the name
    of a transformers tokenizer, whose files are stored beside the head.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any], tokenizer_files: Path | None = None) -> None:
        super().__init__()
        self.text_model: Any = model
        self.config = json.loads(json.dumps(dict(config)))
        self.tokenizer = open_tokenizer(self.config, tokenizer_files)

    @classmethod
    def from_clip(cls, model: nn.Module, config: Mapping[str, Any]) -> "TextHead":
        """Return the head of an open_clip model, with which it shares parameters; `model` is not changed."""
        head = cls.from_config(config)
        state = {name: value for name, value in model.state_dict().items() if not name.startswith("visual.")}
        head.text_model.load_state_dict(state, assign=True)
        return head.eval()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tokenizer_files: Path | None = None) -> "TextHead":
        """Return a head with initial weights; only the text side of `config["model_cfg"]` is built."""
        model_cfg = deepcopy(dict(config["model_cfg"]))
        custom = model_cfg.pop("custom_text", False)
        model_class = CoCa if custom and "multimodal_cfg" in model_cfg else CustomTextCLIP if custom else CLIP
        model: Any = model_class(**{**model_cfg, "vision_cfg": dict(_TINY_TOWER)})
        model.visual = nn.Identity()
        return cls(model, config, tokenizer_files)

    @property
    def logit_scale(self) -> Tensor:
        """Return the learned logarithm of the logit scale."""
        return self.text_model.logit_scale

    @property
    def scale(self) -> float:
        """Return the factor of the cosine similarities, 100 in OpenAI's models."""
        return float(self.logit_scale.detach().exp())

    @torch.no_grad()
    def encode_text(self, texts: list[str], batch: int = 256) -> Tensor:
        """Return (N, D) float32 text embeddings on the head's device, not normalised."""
        device = self.logit_scale.device
        parts = [
            self.text_model.encode_text(self.tokenizer(texts[start : start + batch]).to(device), normalize=False)
            for start in range(0, len(texts), batch)
        ]
        return torch.cat(parts).float()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the weights under open_clip's names; none begins with `visual.`."""
        return self.text_model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state that `state_dict` returned."""
        return self.text_model.load_state_dict(state_dict, strict=strict, assign=assign)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files if it has any, head.safetensors, then head.json, each whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.tokenizer, HFTokenizer):
            self.tokenizer.save_pretrained(folder / "tokenizer")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_whole(folder / "head.safetensors", to_bytes(state))
        write_whole(folder / "head.json", json.dumps(self.config, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "TextHead":
        """Return the head that `save` wrote, in eval mode. Raises UserError if it is missing or damaged."""
        folder = Path(folder)
        try:
            head = cls.from_config(json.loads((folder / "head.json").read_text()), folder / "tokenizer")
            head.load_state_dict(load_file(folder / "head.safetensors"))
        except (OSError, ValueError, TypeError, KeyError, AssertionError, SafetensorError, RuntimeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"{folder}: no readable text head (head.json, head.safetensors): {reason}") from error
        return head.eval()


def stored_scale(folder: str | Path) -> float:
    """Return `scale` of the head in `folder`, without opening its text tower. Raises UserError if it has none."""
    try:
        with safe_open(Path(folder) / "head.safetensors", "pt") as file:
            return float(file.get_tensor("logit_scale").exp())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable logit scale in head.safetensors ({error})") from None


@runtime_checkable
class WholeClip(Protocol):
    """A student that has both towers of a CLIP, so that it needs no teacher's text tower."""

    preprocess: ClipPreprocess
    config: Mapping[str, Any]  # as a `TextHead` has it

    def whole(self) -> CLIP:
        """Return the student as a network of open_clip, in eval mode."""
        ...


def open_tokenizer(config: Mapping[str, Any], files: Path | None) -> Any:
    """Return the tokenizer that a TextHead's `config` states; one of transformers is read from `files`, if a folder.

    Raises UserError if it needs the package transformers, which is missing.
    """
    text_cfg = config["model_cfg"]["text_cfg"]
    settings = {"context_length": text_cfg.get("context_length", 77), **text_cfg.get("tokenizer_kwargs", {})}
    if config["tokenizer"] == "simple":
        return SimpleTokenizer(**settings)
    mode = text_cfg.get("tokenizer_mode")
    source = files if files and files.is_dir() else config["tokenizer"]
    try:
        return HFTokenizer(str(source), tokenizer_mode=mode, **settings)
    except ImportError as error:
        raise UserError(
            f"this CLIP's tokenizer '{config['tokenizer']}' needs the package transformers; pip install transformers"
        ) from error
