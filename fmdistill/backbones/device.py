"""The device that a recipe or protocol names."""

import torch

from fmdistill.registry import UserError


def pick_device(name: str, where: str) -> torch.device:
    """Return the device called `name`; "auto" is the GPU if there is one. UserError unless it can be used here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{where}={name}: not a device; try auto, cpu, cuda or cuda:1") from None
    if device.type == "cpu":
        return torch.device("cpu")  # PyTorch takes any index, but there is only one
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"{where}={name}: no CUDA device is visible to PyTorch here; use auto or cpu")
        _check_index(device, torch.cuda.device_count(), f"{where}={name}")
    else:
        _try(device, f"{where}={name}")
    return device


def _check_index(device: torch.device, count: int, setting: str) -> None:
    if device.index is not None and device.index >= count:
        raise UserError(f"{setting}: PyTorch sees {count} CUDA device{'s' * (count != 1)} here; count from cuda:0")


def _try(device: torch.device, setting: str) -> None:
    """Raise a UserError unless a tensor on `device` can be made and read back: "meta" holds no values."""
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # AssertionError, NotImplementedError, ImportError: each backend has its own
        lines = str(error).split(". ")[0].split()
        reason = " ".join(lines)[:120]
        raise UserError(f"{setting}: this PyTorch cannot compute there ({reason}); use auto or cpu") from None
