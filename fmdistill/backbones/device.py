"""Find the device that a recipe or protocol names, whether it multiplies bf16, and the CPU's cores."""

import os
import platform
from pathlib import Path

import torch

from fmdistill.registry import UserError


def pick_device(name: str, where: str) -> torch.device:
    """Return the device called `name`; "auto" is a GPU if available, else the CPU.

    Raises UserError, which begins with the setting `where`, if this machine cannot use the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{where}={name}: not a device; use auto, cpu, cuda or cuda:1") from None
    if device.type == "cpu":
        return torch.device("cpu")  # PyTorch accepts any index, but the CPU is a single device
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"{where}={name}: no CUDA device is visible to PyTorch; use auto or cpu")
        _check_index(device, torch.cuda.device_count(), f"{where}={name}")
    else:
        _check_usable(device, f"{where}={name}")
    return device


def has_bf16(device: torch.device) -> bool:
    """Return whether `device` is a CPU with bf16 multiplication; emulating it is slower than float32.

    It can be detected on Linux for x86 only; elsewhere False is returned, which `teacher.dtype=bf16` and
    `train.precision=bf16` override.
    """
    info = Path("/proc/cpuinfo")
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not info.is_file():
        return False
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())


def product_name(device: torch.device) -> str:
    """Return the name of a GPU's or the processor's model, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), "") or platform.processor() or platform.machine() or device.type


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_index(device: torch.device, count: int, setting: str) -> None:
    if device.index is not None and device.index >= count:
        raise UserError(f"{setting}: PyTorch sees {count} CUDA device{'s' * (count != 1)}; count from cuda:0")


def _check_usable(device: torch.device, setting: str) -> None:
    """Raise a UserError unless a tensor can be created on `device` and read back: "meta" stores no values."""
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # AssertionError, NotImplementedError, ImportError: it depends on the backend
        words = str(error).split(". ")[0].split()
        reason = " ".join(words)[:120]
        raise UserError(f"{setting}: this PyTorch cannot use the device ({reason}); use auto or cpu") from None
