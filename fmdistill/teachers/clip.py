"""CLIP as a teacher: the image tower of any open_clip model; its embeddings are not normalised."""

# Legend: B images, D the embedding's width, C the tokens' width, g tokens per side, N = g * g.

import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from open_clip import get_model_config
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn

from fmdistill.backbones.clip import ClipPreprocess, TextHead, load_clip
from fmdistill.backbones.clip_tags import (
    PREPROCESSING,
    ClipSettings,
    Interpolation,
    ResizeMode,
    tag_values,
    text_values,
)
from fmdistill.backbones.clip_weights import LOCAL
from fmdistill.backbones.throughput import flops
from fmdistill.registry import UserError, convert, typed
from fmdistill.teachers.compute import DType, Precision, computing, own_device, own_dtype, state_hash
from fmdistill.teachers.family import Family, Reference, weights_setting
from fmdistill.teachers.output import Output, caption_names

DEFAULT = "ViT-B-32"


class ClipTeacher:
    """A frozen image tower of open_clip with the outputs embedding (B, D) and, if `tokens`, tokens (B, C, g, g).

    The embedding is projected. The tokens are the patch tokens of the tower's last layer, at its width C and not
    projected: open_clip's `output_tokens`. With `captions` N, the outputs caption, caption_2 ... (B, D) are the text
    tower's embeddings of N captions of each image, which `encode_captions` makes.
    """

    family = "clip"

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        *,
        name: str,
        kind: str,
        tokens: bool,
        device: str,
        dtype: DType,
        batch: int,
        workers: int,
        captions: int = 0,
    ) -> None:
        self.name, self.kind, self.tokens, self.batch, self.workers = name, kind, tokens, batch, workers
        self.captions = captions
        self.device = own_device(device)
        self.dtype: Precision = own_dtype(dtype, self.device)
        self.model: Any = model.eval().requires_grad_(False)
        self.config, self._head = config, TextHead.from_clip(model, config)
        self.visual: Any = self.model.visual.to(self.device)
        self.outputs = {"embedding": Output((config["model_cfg"]["embed_dim"],))}
        grid = _grid(self.visual)
        if tokens:
            if grid is None:
                raise UserError(
                    f"teacher.tokens=true: the image tower of {kind} ({type(self.visual).__name__}) returns no patch "
                    f"tokens; choose one of open_clip's own ViTs without attentional pooling, or teacher.tokens=false"
                )
            self.visual.output_tokens = True
            self.outputs["tokens"] = Output((self.visual.conv1.out_channels, grid, grid), "all")
        self.outputs |= dict.fromkeys(caption_names(captions), self.outputs["embedding"])
        image_size = ClipPreprocess.from_config(config["preprocess_cfg"], 1).image_size
        self.preprocess = ClipPreprocess.from_config(config["preprocess_cfg"], image_size // (grid or 1))

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Return float32 {"embedding": (B, D)} on the CPU for uint8 (B, 3, S, S) pixels, and "tokens" if requested."""
        x_BCHW = self.preprocess.normalize(pixels.to(self.device), sizes.to(self.device))
        with computing(self.dtype, self.device):
            encoded = self.visual(x_BCHW)
        embedding_BD, *tokens_BNC = encoded if isinstance(encoded, tuple) else (encoded,)
        outputs = {"embedding": embedding_BD.float().cpu()}
        if self.tokens:
            tokens_BCgg = tokens_BNC[0].transpose(1, 2).unflatten(2, self.outputs["tokens"].shape[1:])
            outputs["tokens"] = tokens_BCgg.float().cpu().contiguous()
        return outputs

    @torch.inference_mode()
    def encode_captions(self, texts: Sequence[str]) -> Tensor:
        """Return the texts' embeddings (N, D), float32 on the CPU, not normalised."""
        with computing(self.dtype, self.device):
            return self._text.encode_text(list(texts)).cpu()

    @cached_property
    def _text(self) -> TextHead:
        """The text tower on the teacher's device; the head itself stays on the CPU, from which it is stored."""
        return self._head if self.device.type == "cpu" else copy.deepcopy(self._head).to(self.device)

    def fingerprint(self) -> dict[str, Any]:
        """Return the teacher's identity; the weights' hash covers both towers."""
        return {
            "name": self.name,
            "model": self.kind,
            "weights": state_hash(self.model.state_dict()),
            "preprocess": self.preprocess.to_json(),
            "quick_gelu": bool(self.config["model_cfg"].get("quick_gelu", False)),
            "context_length": text_values(self.config["model_cfg"])["context_length"],
            "tokenizer": self.config["tokenizer"],
            "tokens": self.tokens,
            "normalized": False,
            "dtype": self.dtype,
            "path": "open_clip",
        }

    def head(self) -> TextHead:
        """Return the text tower, logit scale and tokenizer."""
        return self._head


def open_clip(
    model: str = DEFAULT,
    pretrained: str | None = None,
    as_tag: str | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    interpolation: Interpolation | None = None,
    resize_mode: ResizeMode | None = None,
    quick_gelu: bool | None = None,
    context_length: int | None = None,
    tokenizer: str | None = None,
    tokens: bool = False,
    captions: int = 0,  # captions of each image whose embeddings are outputs too
    device: str = "auto",
    dtype: DType = "auto",
    batch: int = 64,
    workers: int = 2,
) -> ClipTeacher:
    """Return any CLIP of open_clip: `model` is a name or local-dir:FOLDER, `pretrained` a tag, a file or none.

    Tags, OpenAI's own .pt files and folders determine preprocessing and activation. For other files these come from
    the tag `as_tag`, or else from all tags of `model` if they agree; each of `ClipSettings` replaces one value.
    `captions` is the number of captions of each image that the text tower embeds. Raises UserError if `pretrained` is
    not set or the weights cannot be loaded.
    """
    local = model.startswith(LOCAL)
    if pretrained is None and not local:
        raise UserError(
            "teacher.pretrained: not set; set it to one of open_clip's tags such as openai, a checkpoint file, "
            "or none for an untrained model"
        )
    unstated = ClipSettings(as_tag, mean, std, interpolation, resize_mode, quick_gelu, context_length, tokenizer)
    clip, config = load_clip(model, pretrained or "none", unstated)
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "batch": batch, "workers": workers}
    settings["captions"] = captions
    return ClipTeacher(clip, config, name="open_clip", kind=_kind(model), tokens=tokens, **settings)


def weights_file(settings: Mapping[str, Any]) -> Path | None:
    """Return the folder or checkpoint file that the settings name; None for a tag, packaged weights, or none."""
    if settings["name"] != "open_clip":
        return weights_setting(settings)
    model, pretrained = str(settings.get("model", DEFAULT)), str(settings.get("pretrained"))
    if model.startswith(LOCAL):
        return Path(model.removeprefix(LOCAL))
    is_path = "/" in pretrained or Path(pretrained).suffix in (".safetensors", ".bin", ".pt", ".pth", ".npz")
    return Path(pretrained) if is_path else None


def clip_settings(settings: Mapping[str, Any]) -> ClipSettings:
    """Return the `ClipSettings` among a recipe's teacher settings."""
    names = [field.name for field in fields(ClipSettings)]
    return ClipSettings(**typed(ClipSettings, {name: settings[name] for name in names if name in settings}, "teacher"))


def identity(settings: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the fingerprint that follows from the settings alone, without reading weights.

    `stored` is a fingerprint; it completes the preprocessing's values that the settings do not state.
    """
    if settings.get("name") != "open_clip":
        return {}
    model, given = str(settings.get("model", DEFAULT)), clip_settings(settings)
    stated: dict[str, Any] = {
        "model": _kind(model),
        "tokens": convert(settings.get("tokens", False), bool, "teacher.tokens"),
    }
    values = given.given()
    if given.as_tag is not None and not model.startswith(LOCAL):
        values = {**tag_values(_kind(model), given.as_tag, get_model_config(_kind(model)) or {}), **values}
    stated |= {key: values[key] for key in ("quick_gelu", "context_length", "tokenizer") if key in values}
    preprocessing = {key: values[key] for key in PREPROCESSING if key in values}
    if preprocessing and "preprocess" in stored:
        stated["preprocess"] = replace(ClipPreprocess.from_json(stored["preprocess"]), **preprocessing).to_json()
    return stated


def random_weights(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings with random weights instead of a checkpoint's. Raises UserError for a model in a folder."""
    if str(settings.get("model", "")).startswith(LOCAL):
        raise UserError(
            f"bench.weights=random: not possible for teacher.model={settings['model']}; remove bench.weights"
        )
    return {**settings, "pretrained" if settings["name"] == "open_clip" else "weights": "none"}


def reference(teacher: ClipTeacher) -> Reference:
    """Return open_clip's own loop, in batches of the teacher's size, with a copy of its weights."""
    network: Any = copy.deepcopy(teacher.model).to(teacher.device)
    network.visual.output_tokens = False
    transform: Any = image_transform_v2(PreprocessCfg(**teacher.config["preprocess_cfg"]), is_train=False)

    @torch.no_grad()
    def embed(pictures: Sequence[Image.Image]) -> Tensor:
        embeddings = []
        for start in range(0, len(pictures), teacher.batch):
            batch = torch.stack([transform(picture) for picture in pictures[start : start + teacher.batch]])
            embeddings.append(network.encode_image(batch.to(teacher.device)).float().cpu())
        return torch.cat(embeddings)

    side = teacher.preprocess.image_size
    blank = torch.zeros(1, 3, side, side, device=teacher.device)
    return Reference(
        "open_clip encode_image",
        embed,
        lambda data: transform(Image.open(io.BytesIO(data))),
        lambda: flops(network.encode_image, blank),
    )


def _kind(model: str) -> str:
    return LOCAL.rstrip(":") if model.startswith(LOCAL) else model.replace("/", "-")


def _grid(visual: Any) -> int | None:
    """Return the side of the patch tokens' grid; None for a tower that returns no patch tokens."""
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None or visual.pool_type == "none":
        return None
    return visual.grid_size[0] if visual.grid_size[0] == visual.grid_size[1] else None


FAMILY = Family(
    name="clip",
    teachers={"open_clip": open_clip, "clip_mini": "fmdistill.mini.clip:clip_mini"},
    preprocess=ClipPreprocess,
    head=TextHead,
    map_setting="tokens",
    weights_file=weights_file,
    identity=identity,
    random_weights=random_weights,
    reference=reference,
)
