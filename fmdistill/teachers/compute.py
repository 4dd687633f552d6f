"""Device, precision and weights' hash of teachers."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from fmdistill.backbones.device import pick_device
from fmdistill.launcher import local_rank

DType = Literal["auto", "fp32", "bf16"]
Precision = Literal["fp32", "bf16"]


def own_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is a different GPU for each process of a launcher."""
    device = pick_device(name, "teacher.device")
    if name == "auto" and device.type == "cuda" and (rank := local_rank()) is not None:
        return torch.device("cuda", rank % torch.cuda.device_count())
    return device


def own_dtype(name: DType, device: torch.device) -> Precision:
    """Return the precision called `name`; "auto" is bf16 on a GPU and fp32 elsewhere."""
    if name == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return name


@contextmanager
def computing(dtype: Precision, device: torch.device) -> Iterator[None]:
    """Compute in `dtype` within the context: fp32 without reduced precision, bf16 by autocast."""
    if dtype == "fp32":
        with full_precision(), torch.autocast(device.type, enabled=False):
            yield
    else:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Turn off TF32 within the context: by default CUDA convolutions round their float32 inputs to 10 bits."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a state dict's names, dtypes, shapes and values; the file's format does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else b"")
        digest.update(b"" if tensor.dim() else repr(tensor.item()).encode())
    return digest.hexdigest()
