"""Any timm model as a teacher: its pooled embedding, and its patch tokens as a map if asked."""

# Legend: B images, S the square's side, D the embedding's width, C the tokens' width, g tokens a side, N tokens.

import copy
import difflib
import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from timm import create_model, list_models, list_pretrained
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from fmdistill.backbones.checkpoints import read_state
from fmdistill.backbones.pixels import RGB, Picture, all_valid, as_image, standardise
from fmdistill.backbones.throughput import flops
from fmdistill.registry import UserError, convert, suggest
from fmdistill.teachers.compute import DType, Precision, computing, own_device, own_dtype, state_hash
from fmdistill.teachers.family import Family, Reference
from fmdistill.teachers.output import Output

LOCAL = "local-dir:"  # begins a model that is a folder of timm's: config.json and the weights
FILES = ("model.safetensors", "pytorch_model.bin")  # of the weights in such a folder
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
Pool = Literal["token", "avg", "avgmax", "max", "map"]


@dataclass(frozen=True)
class TimmPreprocess:
    """timm's evaluation transform: resize to S / `crop_pct` and a centre crop of S x S.

    "center" resizes the shorter side, "squash" both sides, and "border" the longer side, with borders of the mean
    colour, which count as pixels. Source: timm data/transforms_factory.py. `stride` is the side of a patch token.
    """

    image_size: int
    stride: int
    mean: RGB
    std: RGB
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for name in ("image_size", "stride", "crop_pct"):
            if not (value := getattr(self, name)) > 0 or (len(self.mean), len(self.std)) != (3, 3):
                raise UserError(f"preprocessing {name}={value}: expected more than zero, and three channels")
        for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"preprocessing {name}={value}: unknown.{suggest(value, known)}")

    def transform(self, uint8: bool) -> Any:
        """Return timm's own transform, from a PIL image to its pixels, uint8 or as the network's input."""
        values = {key: value for key, value in asdict(self).items() if key not in ("image_size", "stride")}
        return create_transform((3, self.image_size, self.image_size), use_prefetcher=uint8, **values)

    @cached_property
    def _to_pixels(self) -> Any:
        return self.transform(uint8=True)

    def prepare(self, image: Picture) -> tuple[Tensor, tuple[int, int]]:
        """Return uint8 pixels (3, S, S) in RGB and (S, S); every pixel counts as real."""
        pixels_3SS: Tensor = self._to_pixels(as_image(image).convert("RGB"))
        return pixels_3SS.contiguous(), (self.image_size, self.image_size)

    def normalize(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Return uint8 pixels (B, 3, S, S) as float32 (x / 255 - mean) / std."""
        return standardise(pixels, self.mean, self.std)

    def valid(self, sizes: Tensor) -> Tensor:
        """Return bool (B, g, g), all True: a crop has no padding."""
        return all_valid(sizes, self.image_size // self.stride)

    def to_json(self) -> dict[str, Any]:
        """Return what determines the network's input, for a manifest."""
        return {"name": "timm", **asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "TimmPreprocess":
        """Return the preprocessing that `to_json` described; any other description is an error."""
        try:
            values = {key: value for key, value in stored.items() if key != "name"}
            made = cls(**{**values, "mean": tuple(stored["mean"]), "std": tuple(stored["std"])})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"preprocessing {dict(stored)!r}: not the 'timm' preprocessing ({error})") from None
        if made.to_json() != dict(stored):
            raise UserError(f"preprocessing {dict(stored)!r}: not the 'timm' preprocessing of this version")
        return made

    @classmethod
    def of(cls, model: nn.Module, image_size: int | None, where: str) -> "TimmPreprocess":
        """Return what timm resolves for `model`, with one token an image; UserError unless it sees RGB squares."""
        args = {} if image_size is None else {"input_size": (3, image_size, image_size)}
        config = resolve_model_data_config(model, args=args)
        channels, height, width = config["input_size"]
        if channels != 3 or height != width:
            raise UserError(f"{where}: sees {channels} x {height} x {width}, not RGB squares; set teacher.image_size")
        mean, std = (tuple(map(float, config[name])) for name in ("mean", "std"))
        crop = config["interpolation"], float(config["crop_pct"]), config["crop_mode"]
        return cls(height, height, mean, std, *crop)  # type: ignore[arg-type]


class TimmTeacher:
    """A timm model, frozen: the embedding (B, D) that it pools before its classifier, and (B, C, g, g) tokens if asked.

    The tokens are the last features, normalised as the model itself does, without class and register tokens.
    """

    family = "timm"

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: str,
        tokens: bool = False,
        pool: str | None = None,
        image_size: int | None = None,
        device: str,
        dtype: DType,
        batch: int,
        workers: int,
    ) -> None:
        self.kind, self.tokens, self.pool, self.batch, self.workers = kind, tokens, pool, batch, workers
        self.device = own_device(device)
        self.dtype: Precision = own_dtype(dtype, self.device)
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        where = f"teacher.model={kind}"
        preprocess = TimmPreprocess.of(model, image_size, where)
        features, embedding_1D = self._blank(preprocess.image_size, where)
        if embedding_1D.dim() != 2:
            raise UserError(f"{where}: gives an embedding of {tuple(embedding_1D.shape[1:])}, not a vector; set a pool")
        self.outputs = {"embedding": Output((embedding_1D.shape[1],))}
        map_1Cgg = as_map(self.model, features)
        shape = (0, 0, 1) if map_1Cgg is None else tuple(map_1Cgg.shape[1:])
        grid = shape[1] if shape[1] == shape[2] else 1
        if tokens:
            if shape[1] != shape[2]:
                raise UserError(
                    f"{where}, teacher.tokens=true: its features {tuple(features.shape[1:])} are no square grid of "
                    f"patch tokens; choose another model, or teacher.tokens=false"
                )
            self.outputs["tokens"] = Output(shape, "all")
        self.preprocess = replace(preprocess, stride=preprocess.image_size // grid)

    def __call__(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": float32 (B, D)} on the CPU for uint8 (B, 3, S, S) pixels; and "tokens" (B, C, g, g)."""
        features, embedding_BD = self._forward(self.preprocess.normalize(pixels.to(self.device), sizes))
        outputs = {"embedding": embedding_BD.float().cpu()}
        if self.tokens:
            tokens_BCgg = as_map(self.model, features)
            assert tokens_BCgg is not None
            outputs["tokens"] = tokens_BCgg.float().cpu().contiguous()
        return outputs

    @torch.inference_mode()
    def _forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        with computing(self.dtype, self.device):
            features = self.model.forward_features(x_BCHW)
            return features, self.model.forward_head(features, pre_logits=True)

    def _blank(self, side: int, where: str) -> tuple[Tensor, Tensor]:
        """Return features and embedding of a blank image; UserError if the model cannot see squares of this side."""
        try:
            return self._forward(torch.zeros(1, 3, side, side, device=self.device))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # by what the model is made of
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{where}: gives no features of a {side} x {side} image ({reason}); set teacher.image_size to a side "
                f"that it can see, or choose another model"
            ) from None

    def fingerprint(self) -> dict[str, Any]:
        """Return the teacher's identity."""
        return {
            "name": "timm",
            "model": self.kind,
            "weights": state_hash(self.model.state_dict()),
            "preprocess": self.preprocess.to_json(),
            "pool": self.pool,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "path": "timm",
        }

    def head(self) -> None:
        """Return None: nothing is stored beside the shards."""


def as_map(model: Any, features: Tensor) -> Tensor | None:
    """Return timm features as a map (B, C, H, W); None unless they are a map, or prefix tokens and a known grid."""
    if features.dim() == 4:
        width, layout = model.num_features, getattr(model, "output_fmt", None)
        layout = layout or ("NHWC" if features.shape[1] != width == features.shape[3] else "NCHW")
        return features.permute(0, 3, 1, 2) if getattr(layout, "value", layout) == "NHWC" else features
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if features.dim() != 3 or grid is None:
        return None
    tokens_BCN = features[:, getattr(model, "num_prefix_tokens", 0) :].transpose(1, 2)
    return tokens_BCN.unflatten(2, tuple(grid)) if tokens_BCN.shape[2] == grid[0] * grid[1] else None


def timm(
    model: str,
    pretrained: str | bool = True,
    pool: Pool | None = None,
    tokens: bool = False,
    image_size: int | None = None,
    device: str = "auto",
    dtype: DType = "auto",
    batch: int = 64,
    workers: int = 2,
) -> TimmTeacher:
    """Any timm model: `model` a name, with or without a tag, hf-hub:NAME, or local-dir:FOLDER.

    `pretrained` is true (timm downloads the weights), false (an untrained model) or a checkpoint file. `pool` replaces
    the model's own pooling, and `image_size` its own input side.
    """
    _check_name(model, f"teacher.model={model}")
    source = _source({"model": model, "pretrained": pretrained})
    _check_source(model, source)
    made = _build(model, source is True, pool, image_size)
    if isinstance(source, Path):
        load_weights(made, source, f"teacher.pretrained={source}")
    stated: dict[str, Any] = {"kind": _kind(model), "tokens": tokens, "pool": pool, "image_size": image_size}
    return TimmTeacher(made, **stated, device=device, dtype=dtype, batch=batch, workers=workers)


def load_weights(model: nn.Module, path: Path, where: str) -> None:
    """Fill `model` from a checkpoint file of timm, or of a publisher whose names timm converts; UserError if not whole.

    Left out are a classifier, and an attention pool that `model` does not have.
    """
    own = model.state_dict()
    state = _without_heads(model, read_state(path, where, own.keys()))
    # By timm's convention this function of a model's file converts names and resizes position embeddings.
    converted = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if _misfits(own, state) and converted is not None:
        with suppress(Exception):  # it may fail for any other file; the error below names what does not fit
            state = _without_heads(model, converted(dict(state), model))
    if misfits := _misfits(own, state):
        shown = ", ".join(misfits[:3]) + (f" and {len(misfits) - 3} more" if len(misfits) > 3 else "")
        raise UserError(f"{where}: does not fit the model: {shown}; give a file of this very model, or another model")
    model.load_state_dict(state)


def _without_heads(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    config: Any = getattr(model, "pretrained_cfg", {})
    heads, own = config.get("classifier") or (), model.state_dict().keys()
    left_out = tuple(f"{name}." for name in [*([heads] if isinstance(heads, str) else heads), "attn_pool"])
    return {name: value for name, value in state.items() if name in own or not name.startswith(left_out)}


def _misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return what keeps `state` from filling `own`, one text a name."""
    missing = [f"{name} is missing" for name in own if name not in state]
    wrong = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    return [*missing, *wrong, *(f"{name} is not the model's" for name in state if name not in own)]


def _build(model: str, pretrained: bool, pool: str | None, image_size: int | None) -> nn.Module:
    settings: dict[str, Any] = {"num_classes": 0} | ({"global_pool": pool} if pool else {})
    try:
        if image_size is not None and _has_own_size(model):
            settings["img_size"] = image_size
        return create_model(model, pretrained=pretrained, **settings)
    except Exception as error:  # each hub client has its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if pretrained and not isinstance(error, AssertionError | TypeError):  # which settings raise, not downloads
            raise UserError(
                f"teacher.pretrained=true: timm could not load the weights of {model} ({reason}). Without network, set "
                f"teacher.pretrained=FILE to its model.safetensors; a licence is accepted on the model's page, and "
                f"`hf auth login` tells the hub who you are"
            ) from error
        raise UserError(f"teacher.model={model}: timm cannot build it with {settings} ({reason})") from error


def _has_own_size(model: str) -> bool:
    """Return whether a model is built for one side of images, as ViTs are and convolutions are not."""
    if ":" in model:
        built: Any = create_model(model, num_classes=0)
        return bool(built.pretrained_cfg.get("fixed_input_size"))
    return bool(getattr(get_pretrained_cfg(model), "fixed_input_size", False))


def _check_name(model: str, where: str) -> None:
    if ":" in model:
        folder = Path(model.removeprefix(LOCAL))
        if model.startswith(LOCAL) and not (folder / "config.json").is_file():
            raise UserError(f"{where}: no timm model in that folder; it needs config.json and {FILES[0]}")
        return
    name, _, tag = model.partition(".")
    if name not in (names := list_models()):
        near = difflib.get_close_matches(name, names, 5, 0.5)
        raise UserError(f"{where}: none of timm's {len(names):,} models.{suggest(name, near)} See timm.list_models()")
    tags = [known.partition(".")[2] for known in list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        raise UserError(f"{where}: {name} has no weights '{tag}'.{suggest(tag, tags)}")


def _check_source(model: str, source: Path | bool) -> None:
    if isinstance(source, Path) and not source.is_file():
        raise UserError(f"teacher.pretrained={source}: no such file; give a checkpoint file, true, or false")
    if source is True and ":" not in model and not getattr(get_pretrained_cfg(model), "has_weights", False):
        raise UserError(f"teacher.pretrained=true: timm has no weights of {model}; give a file, or another model")


def _source(settings: Mapping[str, Any]) -> Path | bool:
    """Return the file that the settings name, true for a download, or false for an untrained model."""
    given, model = settings.get("pretrained", True), str(settings.get("model", ""))
    if isinstance(given, str) and given.lower() in ("true", "false", "none"):
        given = given.lower() == "true"
    if given is True and model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL))
        return next((folder / name for name in FILES if (folder / name).is_file()), folder / FILES[0])
    return given if isinstance(given, bool) else Path(given)


def _kind(model: str) -> str:
    return LOCAL.rstrip(":") if model.startswith(LOCAL) else model


def weights_file(settings: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint file that the settings name; None for a download and for an untrained model."""
    source = _source(settings)
    return source if isinstance(source, Path) else None


def identity(settings: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the fingerprint that the settings state without the weights.

    `stored` is a fingerprint with the preprocessing's values that the settings do not state.
    """
    size = convert(settings.get("image_size"), int | None, "teacher.image_size")
    stated: dict[str, Any] = {
        "model": _kind(str(settings.get("model", ""))),
        "pool": settings.get("pool"),
        "tokens": convert(settings.get("tokens", False), bool, "teacher.tokens"),
    }
    if size is not None and "preprocess" in stored:
        stated["preprocess"] = replace(TimmPreprocess.from_json(stored["preprocess"]), image_size=size).to_json()
    return stated


def random_weights(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings with weights that are drawn instead of read."""
    return {**settings, "pretrained": False}


def reference(teacher: TimmTeacher) -> Reference:
    """Return timm's own loop, by batches as large as the teacher's, with a copy of its weights."""
    network: Any = copy.deepcopy(teacher.model)
    transform = teacher.preprocess.transform(uint8=False)

    @torch.no_grad()
    def embed(pictures: Sequence[Image.Image]) -> Tensor:
        embeddings = []
        for start in range(0, len(pictures), teacher.batch):
            batch = torch.stack([transform(picture) for picture in pictures[start : start + teacher.batch]])
            embeddings.append(network(batch.to(teacher.device)).float().cpu())
        return torch.cat(embeddings)

    side = teacher.preprocess.image_size
    blank = torch.zeros(1, 3, side, side, device=teacher.device)
    return Reference(
        "timm model(image)",
        embed,
        lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB")),
        lambda: flops(network, blank),
    )


FAMILY = Family(
    name="timm",
    teachers={"timm": timm},
    preprocess=TimmPreprocess,
    map_setting="tokens",
    weights_file=weights_file,
    identity=identity,
    random_weights=random_weights,
    reference=reference,
)
