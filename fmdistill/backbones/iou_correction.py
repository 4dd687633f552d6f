"""Correct the IoU that SAM's mask decoder predicts by a power, which changes no order of masks; a run can store it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from fmdistill.backbones.promptable import PromptHead
from fmdistill.files import file_hash, write_whole
from fmdistill.logs import log
from fmdistill.registry import UserError

NAME = "iou_correction.json"  # in a run's folder


@dataclass(frozen=True)
class IouCorrection:
    """Maps predicted IoU p of masks 1 to 3 to sign(p) |p| ** exponent, which increases everywhere.

    Of a prompt's three masks the best predicted one stays the same.
    """

    exponent: float

    def __post_init__(self) -> None:
        """Raise a UserError for an exponent that is not above 0, or not finite."""
        if not 0 < self.exponent < float("inf"):
            raise UserError(f"exponent={self.exponent}: expected a finite number above 0")

    def __call__(self, predicted: Any) -> Any:
        """Return corrected IoU of the same shape, a tensor or an array."""
        signs = torch.sign(predicted) if isinstance(predicted, Tensor) else np.sign(predicted)
        return signs * abs(predicted) ** self.exponent

    def store(self, run: Path, weights: Path, described: Mapping[str, Any]) -> Path:
        """Write the correction into a run's folder, for the student with these weights; return its path."""
        content = {"format": 1, "exponent": self.exponent, "weights": file_hash(weights), **described}
        write_whole(run / NAME, json.dumps(content, indent=1))
        return run / NAME

    @classmethod
    def stored(cls, run: Path, weights: Path) -> "IouCorrection | None":
        """Return a run's correction; None, with a warning, if it is of other weights. Raises UserError if damaged."""
        path = run / NAME
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
            correction, digest = cls(float(content["exponent"])), content["weights"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a correction of fmdistill ({error}); delete it") from error
        if digest != file_hash(weights):
            log.warning("%s: is of other weights than the run's, and not used; evaluate with store=true again", path)
            return None
        return correction

    def apply(self, head: PromptHead) -> None:
        """Make the head predict corrected IoU from now on; the names and values of its weights stay."""
        network = head.mask_decoder.iou_prediction_head
        if isinstance(network, CorrectedIouHead):
            network.correction = self
        else:
            head.mask_decoder.iou_prediction_head = CorrectedIouHead(network, self)


def corrected(head: PromptHead, run: Path, weights: Path) -> PromptHead:
    """Return the head, which from now on predicts IoU as the correction stored in the run's folder says, if any."""
    correction = IouCorrection.stored(run, weights)
    if correction is not None:
        correction.apply(head)
    return head


class CorrectedIouHead(MLP):
    """SAM's network of predicted IoU with the same weights, followed by a correction of masks 1 to 3."""

    def __init__(self, head: MLP, correction: IouCorrection) -> None:
        nn.Module.__init__(self)
        self.num_layers, self.layers, self.sigmoid_output = head.num_layers, head.layers, head.sigmoid_output
        self.correction = correction

    def forward(self, x: Tensor) -> Tensor:
        """Return predicted IoU (P, 4)."""
        predicted_P4 = super().forward(x)
        return torch.cat([predicted_P4[:, :1], self.correction(predicted_P4[:, 1:])], dim=1)
