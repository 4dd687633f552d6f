"""Correct the IoU that SAM's mask decoder predicts by a power, which changes no order of masks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from fmdistill.backbones.promptable import PromptHead
from fmdistill.files import file_hash, write_whole
from fmdistill.logs import log
from fmdistill.registry import UserError

NAME = "calibration.json"


@dataclass(frozen=True)
class IouCorrection:
    """Maps predicted IoU p to sign(p) |p| ** exponent: increasing everywhere, so that the best mask stays the best."""

    exponent: float

    def __post_init__(self) -> None:
        """Raise a UserError for an exponent that is not above 0, or not finite."""
        if not 0 < self.exponent < float("inf"):
            raise UserError(f"exponent={self.exponent}: expected a finite number above 0")

    @overload
    def __call__(self, predicted: Tensor) -> Tensor: ...
    @overload
    def __call__(self, predicted: np.ndarray) -> np.ndarray: ...
    def __call__(self, predicted: Any) -> Any:
        """Return corrected IoU of the same shape."""
        if isinstance(predicted, Tensor):
            return torch.sign(predicted) * predicted.abs() ** self.exponent
        return np.sign(predicted) * np.abs(predicted) ** self.exponent
