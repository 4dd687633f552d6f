"""Teachers: frozen models whose outputs are cached. Each maps prepared images to named outputs."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from fmdistill.backbones.heads import Head
from fmdistill.backbones.mini import build_sam_mini
from fmdistill.backbones.preprocess import Preprocess
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import SamPreprocess, build_sam
from fmdistill.cache import class_teacher, clip_teacher
from fmdistill.cache.compute import DType, Precision, computing, own_device, own_dtype, state_hash
from fmdistill.registry import UserError, bind, convert


class Teacher(Protocol):
    """What the cache asks of a teacher."""

    family: str  # prefix of its outputs, such as "sam"
    preprocess: Preprocess
    outputs: dict[str, tuple[int, ...]]  # name -> shape of one image's output
    batch: int
    workers: int

    def __call__(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Map uint8 (B, 3, S, S) pixels and their (B, 2) sizes to float32 outputs on the CPU."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return all that the outputs depend on: weights, preprocessing, compute dtype and path."""
        ...

    def head(self) -> Head:
        """Return the small part that is kept beside the shards."""
        ...


class SamTeacher:
    """segment_anything's image encoder, frozen; its output is the post-neck embedding (B, C, g, g)."""

    family = "sam"

    def __init__(self, sam: Sam, *, name: str, device: str, dtype: DType, batch: int, workers: int) -> None:
        self.name, self.batch, self.workers = name, batch, workers
        self.device = own_device(device)
        self.dtype: Precision = own_dtype(dtype, self.device)
        self.sam = sam.eval().requires_grad_(False)
        self.encoder = self.sam.image_encoder.to(self.device)
        size = self.encoder.img_size
        grid = self.sam.prompt_encoder.image_embedding_size[0]
        self.preprocess = SamPreprocess(image_size=size, stride=size // grid)
        channels = self.sam.prompt_encoder.embed_dim
        self.outputs = {"embedding": (channels, grid, grid)}

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": float32 (B, C, g, g)} on the CPU for uint8 (B, 3, S, S) pixels."""
        x_BCHW = self.preprocess.normalize(pixels.to(self.device), sizes.to(self.device))
        with computing(self.dtype, self.device):
            embedding_BCHW = self.encoder(x_BCHW)
        return {"embedding": embedding_BCHW.float().cpu()}

    def fingerprint(self) -> dict[str, Any]:
        """Return the teacher's identity."""
        return {
            "name": self.name,
            "weights": state_hash(self.sam.state_dict()),
            "preprocess": self.preprocess.to_json(),
            "dtype": self.dtype,
            "path": "segment_anything",
            "padding": "a token is valid if it holds any real pixel",
        }

    def head(self) -> PromptHead:
        """Return SAM's prompt encoder and mask decoder."""
        return PromptHead.from_sam(self.sam)


def sam_vit_b(
    weights: str | None = None, device: str = "auto", dtype: DType = "auto", batch: int = 4, workers: int = 2
) -> SamTeacher:
    """SAM ViT-B, 1024 px."""
    return _official("vit_b", weights, device=device, dtype=dtype, batch=batch, workers=workers)


def sam_vit_l(
    weights: str | None = None, device: str = "auto", dtype: DType = "auto", batch: int = 4, workers: int = 2
) -> SamTeacher:
    """SAM ViT-L, 1024 px."""
    return _official("vit_l", weights, device=device, dtype=dtype, batch=batch, workers=workers)


def sam_vit_h(
    weights: str | None = None, device: str = "auto", dtype: DType = "auto", batch: int = 4, workers: int = 2
) -> SamTeacher:
    """SAM ViT-H, 1024 px."""
    return _official("vit_h", weights, device=device, dtype=dtype, batch=batch, workers=workers)


def sam_mini(
    weights: str = "packaged", device: str = "auto", dtype: DType = "auto", batch: int = 16, workers: int = 2
) -> SamTeacher:
    """The quarter-scale SAM that ships with fmdistill, 256 px; or one that you trained: its run or safetensors file."""
    sam = build_sam_mini(Path(weights) / "student.safetensors" if Path(weights).is_dir() else weights)
    return SamTeacher(sam, name="sam_mini", device=device, dtype=dtype, batch=batch, workers=workers)


TEACHERS = {
    "sam_vit_b": sam_vit_b,
    "sam_vit_l": sam_vit_l,
    "sam_vit_h": sam_vit_h,
    "sam_mini": sam_mini,
    "open_clip": clip_teacher.open_clip,
    "clip_mini": clip_teacher.clip_mini,
    "classifier": class_teacher.classifier,
}
UNPADDED = {"open_clip", "clip_mini", "classifier"}


def build(settings: Mapping[str, Any]) -> Teacher:
    """Return the teacher that a recipe names."""
    return check(settings)()


def check(settings: Mapping[str, Any], trim: bool = False) -> functools.partial:
    """Bind the teacher's settings without loading it; `live` is the recipe's, and no teacher's.

    UserError for `trim`, the cache's, where the teacher is known to pad no image.
    """
    if trim and settings.get("name") in UNPADDED:
        refuse_trim(f"teacher.name={settings['name']}")
    return bind({key: value for key, value in settings.items() if key != "live"}, TEACHERS, "teacher")


def check_pads(model: Teacher) -> None:
    """Raise a UserError unless the teacher pads images: what `cache.trim` leaves out."""
    if bool(model.preprocess.valid(torch.tensor([[1, 1]])).all()):
        refuse_trim(type(model).__name__)


def refuse_trim(name: str) -> NoReturn:
    """Raise the UserError that a teacher has no padding."""
    raise UserError(f"cache.trim=true: {name} pads no image, so there is nothing to trim; leave `trim` out")


def is_live(settings: Mapping[str, Any] | None) -> bool:
    """Return whether the teacher runs beside the student, rather than once into a cache."""
    return convert((settings or {}).get("live", False), bool, "teacher.live")


def weights_path(settings: Mapping[str, Any]) -> Path | None:
    """Return where the weights lie that `settings` name; None where they are packaged, open_clip's own, or unknown."""
    weights = settings.get("weights")
    if settings["name"] == "open_clip":
        return clip_teacher.weights_path(settings)
    if settings["name"] not in TEACHERS:  # of another teacher it is not known that `weights` is a file
        return None
    return Path(weights) if isinstance(weights, str) and weights not in ("", "none", "packaged") else None


def asked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the fingerprint that `settings` tell without the weights."""
    found = {"name": settings["name"]}
    if settings.get("dtype", "auto") != "auto":
        found["dtype"] = settings["dtype"]
    return {**found, **(clip_teacher.asked(settings) if settings["name"] == "open_clip" else {})}


def _official(kind: Literal["vit_b", "vit_l", "vit_h"], weights: str | None, **settings: Any) -> SamTeacher:
    return SamTeacher(build_sam(kind, weights), name=f"sam_{kind}", **settings)
