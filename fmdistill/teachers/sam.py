"""SAM as a teacher: segment_anything's image encoder, whose output is the embedding after the neck."""

# Legend: B images, S the padded square's side, C channels, g tokens per side.

import copy
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor, nn

from fmdistill.backbones.device import has_bf16
from fmdistill.backbones.fast_encoder import FastEncoder, supported
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import RESIZE, SamPreprocess, build_sam
from fmdistill.backbones.throughput import flops
from fmdistill.logs import log
from fmdistill.registry import convert
from fmdistill.teachers.compute import DType, Precision, computing, own_device, own_dtype, state_hash
from fmdistill.teachers.family import Family, Reference, weights_setting
from fmdistill.teachers.output import Output

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PATHS = {True: "segment_anything", False: "fast"}  # by `exact`
OFFICIAL = {"sam_vit_b": "vit_b", "sam_vit_l": "vit_l", "sam_vit_h": "vit_h"}  # segment_anything's own names


class SamTeacher:
    """SAM's image encoder, frozen; its output is the post-neck embedding (B, C, g, g).

    It runs as a `FastEncoder`, compiled on a GPU. With `exact`, it runs segment_anything's own forward instead, in fp32
    unless `dtype` is set.
    """

    family = "sam"

    def __init__(
        self, sam: Sam, *, name: str, device: str, dtype: DType, batch: int, workers: int, exact: bool = False
    ) -> None:
        self.name, self.batch, self.workers = name, batch, workers
        self.device = own_device(device)
        self.sam = sam.eval().requires_grad_(False)
        sam_encoder: Any = self.sam.image_encoder
        self.exact = exact or not supported(sam_encoder)
        self.dtype: Precision = "fp32" if exact and dtype == "auto" else own_dtype(dtype, self.device)
        accelerated = self.device.type != "cpu"
        fast = None if self.exact else FastEncoder(sam_encoder, PRECISIONS[self.dtype], fused=accelerated)
        self.encoder: nn.Module = (fast or sam_encoder).eval().to(self.device)
        self.compiled = fast is not None and accelerated
        self._run: Any = torch.compile(self.encoder, dynamic=False) if self.compiled else self.encoder
        grid = self.sam.prompt_encoder.image_embedding_size[0]
        size = sam_encoder.img_size
        self.preprocess = SamPreprocess(image_size=size, stride=size // grid, exact=exact)
        self.outputs = {"embedding": Output((self.sam.prompt_encoder.embed_dim, grid, grid), "image")}

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": float32 (B, C, g, g)} on the CPU for uint8 (B, 3, S, S) pixels."""
        count = len(pixels)
        if self.compiled and count < self.batch:  # a batch of another size would be compiled again
            pixels, sizes = (_filled(x, self.batch) for x in (pixels, sizes))
        x_BCHW = self.preprocess.normalize(pixels.to(self.device), sizes.to(self.device))
        # FastEncoder converts its weights once; autocast would convert them at every call.
        with computing(self.dtype if self.exact else "fp32", self.device):
            embedding_BCHW = self._encode(x_BCHW)
        return {"embedding": embedding_BCHW[:count].float().cpu()}

    def _encode(self, x_BCHW: Tensor) -> Tensor:
        try:
            return self._run(x_BCHW)
        except RuntimeError as error:
            if not self.compiled or isinstance(error, torch.OutOfMemoryError):
                raise
            # Compiling needs a C compiler and more, which not every machine has; without it the arithmetic is the same.
            reason = " ".join(str(error).split())[:200]
            log.warning("teacher %s: not compiled, so slower: %s", self.name, reason)
            self.compiled, self._run = False, self.encoder
            return self.encoder(x_BCHW)

    def fingerprint(self) -> dict[str, Any]:
        """Return the teacher's identity.

        "path" is "fast" on every device: kernels differ within the rounding of `dtype`, as they do between devices on
        segment_anything's own path.
        """
        return {
            "name": self.name,
            "weights": state_hash(self.sam.state_dict()),
            "preprocess": self.preprocess.to_json(),
            "dtype": self.dtype,
            "path": PATHS[self.exact],
            "padding": "a token is valid if it holds any real pixel",
        }

    def head(self) -> PromptHead:
        """Return SAM's prompt encoder and mask decoder."""
        return PromptHead.from_sam(self.sam)


def sam_vit_b(
    weights: str | None = None,
    device: str = "auto",
    dtype: DType = "auto",
    batch: int = 4,
    workers: int = 2,
    exact: bool = False,
) -> SamTeacher:
    """Return SAM ViT-B, 1024 px, with the checkpoint `weights`."""
    return _official("vit_b", weights, device=device, dtype=dtype, batch=batch, workers=workers, exact=exact)


def sam_vit_l(
    weights: str | None = None,
    device: str = "auto",
    dtype: DType = "auto",
    batch: int = 4,
    workers: int = 2,
    exact: bool = False,
) -> SamTeacher:
    """Return SAM ViT-L, 1024 px, with the checkpoint `weights`."""
    return _official("vit_l", weights, device=device, dtype=dtype, batch=batch, workers=workers, exact=exact)


def sam_vit_h(
    weights: str | None = None,
    device: str = "auto",
    dtype: DType = "auto",
    batch: int = 4,
    workers: int = 2,
    exact: bool = False,
) -> SamTeacher:
    """Return SAM ViT-H, 1024 px, with the checkpoint `weights`."""
    return _official("vit_h", weights, device=device, dtype=dtype, batch=batch, workers=workers, exact=exact)


def identity(settings: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the fingerprint that follows from a SAM teacher's settings alone, without reading weights."""
    exact = convert(settings.get("exact", False), bool, "teacher.exact")
    dtype = {"dtype": "fp32"} if exact and settings.get("dtype", "auto") == "auto" else {}
    return {"path": PATHS[exact], **dtype}


def random_weights(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings with random weights instead of a checkpoint's; those of official networks are in `folder`."""
    name = settings["name"]
    if name not in OFFICIAL:
        return {**settings, "weights": "none"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sam, path = sam_model_registry[OFFICIAL[name]](), folder / "drawn.pth"
        for parameter in sam.parameters():  # a device may multiply zeros faster
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        torch.save(sam.state_dict(), path)
    return {**settings, "weights": str(path)}


def reference(teacher: SamTeacher) -> Reference:
    """Return segment_anything's own loop, one image at a time, with a copy of the teacher's weights."""
    predictor = SamPredictor(copy.deepcopy(teacher.sam).to(teacher.device))
    side = teacher.preprocess.image_size

    def embed(pictures: Sequence[Image.Image]) -> Tensor:
        embeddings = []
        for picture in pictures:
            predictor.set_image(np.asarray(picture))
            embeddings.append(predictor.get_image_embedding().float().cpu())
        return torch.cat(embeddings)

    def pixels(data: bytes) -> Tensor:
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        resized = torch.as_tensor(predictor.transform.apply_image(image))
        padded = torch.zeros(3, side, side, dtype=torch.uint8)  # the predictor pads on the device
        padded[:, : resized.shape[0], : resized.shape[1]] = resized.permute(2, 0, 1)
        return padded

    blank = torch.zeros(1, 3, side, side, device=teacher.device)
    return Reference("SamPredictor.set_image", embed, pixels, lambda: flops(predictor.model.image_encoder, blank))


def _official(
    kind: Literal["vit_b", "vit_l", "vit_h"],
    weights: str | None,
    *,
    device: str,
    dtype: DType,
    exact: bool,
    **sizes: int,
) -> SamTeacher:
    if dtype == "auto" and not exact and has_bf16(own_device(device)):
        dtype = "bf16"
    sam = build_sam(kind, weights)
    return SamTeacher(sam, name=f"sam_{kind}", device=device, dtype=dtype, exact=exact, **sizes)


def _filled(x_B: Tensor, count: int) -> Tensor:
    """Append copies of the first entry to `x_B` until it has `count` entries."""
    return torch.cat([x_B, x_B[:1].expand(count - len(x_B), *x_B.shape[1:])])


FAMILY = Family(
    name="sam",
    teachers={
        "sam_vit_b": sam_vit_b,
        "sam_vit_l": sam_vit_l,
        "sam_vit_h": sam_vit_h,
        "sam_mini": "fmdistill.mini.sam:sam_mini",
    },
    preprocess=SamPreprocess,
    head=PromptHead,
    pads=True,
    weights_file=weights_setting,
    identity=identity,
    matching_settings={
        ("teacher.path", PATHS[True]): "teacher.exact=true",
        ("teacher.path", PATHS[False]): "teacher.exact=false",
        ("teacher.preprocess.resize", RESIZE[True]): "teacher.exact=true",
        ("teacher.preprocess.resize", RESIZE[False]): "teacher.exact=false",
    },
    random_weights=random_weights,
    reference=reference,
)
