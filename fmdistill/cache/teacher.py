"""Teachers: frozen models whose outputs are cached. Each maps prepared images to named outputs."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from fmdistill.backbones.device import pick_device
from fmdistill.backbones.mini import build_sam_mini
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import SamPreprocess, build_sam
from fmdistill.registry import bind

DType = Literal["auto", "fp32", "bf16"]


class Teacher(Protocol):
    """What the cache asks of a teacher."""

    family: str  # prefix of its outputs, such as "sam"
    preprocess: SamPreprocess
    outputs: dict[str, tuple[int, ...]]  # name -> shape of one image's output
    batch: int
    workers: int

    def __call__(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Map uint8 (B, 3, S, S) pixels and their (B, 2) sizes to float32 outputs on the CPU."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return all that the outputs depend on: weights, preprocessing, compute dtype and path."""
        ...

    def head(self) -> PromptHead:
        """Return the small part that is kept beside the shards."""
        ...


class SamTeacher:
    """segment_anything's image encoder, frozen; its output is the post-neck embedding (B, C, g, g)."""

    family = "sam"

    def __init__(self, sam: Sam, *, name: str, device: str, dtype: DType, batch: int, workers: int) -> None:
        self.name, self.batch, self.workers = name, batch, workers
        self.device = own_device(device)
        self.dtype = dtype if dtype != "auto" else ("bf16" if self.device.type == "cuda" else "fp32")
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
        exact = self.dtype == "fp32"
        with (
            full_precision() if exact else nullcontext(),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=not exact),
        ):
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


TEACHERS = {"sam_vit_b": sam_vit_b, "sam_vit_l": sam_vit_l, "sam_vit_h": sam_vit_h, "sam_mini": sam_mini}


def build(settings: Mapping[str, Any]) -> Teacher:
    """Return the teacher that a recipe names."""
    return bind(settings, TEACHERS, "teacher")()


def own_device(name: str) -> torch.device:
    """Return the device called `name`; of several processes that a launcher started, "auto" gives each its own GPU."""
    device, local = pick_device(name, "teacher.device"), os.environ.get("LOCAL_RANK")
    if name == "auto" and device.type == "cuda" and local:
        return torch.device("cuda", int(local) % torch.cuda.device_count())
    return device


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in float32 as such: by default PyTorch's convolutions on CUDA round their inputs to TF32's 10 bits."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a state dict's names, dtypes, shapes and values, whatever file it came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else b"")
        digest.update(b"" if tensor.dim() else repr(tensor.item()).encode())
    return digest.hexdigest()


def _official(kind: Literal["vit_b", "vit_l", "vit_h"], weights: str | None, **settings: Any) -> SamTeacher:
    return SamTeacher(build_sam(kind, weights), name=f"sam_{kind}", **settings)
