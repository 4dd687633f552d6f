"""The device that a recipe or protocol names."""

import torch

from fmdistill.registry import UserError


def pick_device(name: str, where: str) -> torch.device:
    """Return the device called `name`; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{where}={name}: not a device; try auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{where}={name}: no CUDA device is visible to PyTorch here; use auto or cpu")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"{where}={name}: PyTorch sees {count} CUDA device{'s' * (count != 1)} here; count from cuda:0")
    return device
