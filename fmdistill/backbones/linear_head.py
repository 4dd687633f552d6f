"""The last layer of a classifier, stored beside its cached features."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from fmdistill.files import write_whole
from fmdistill.registry import UserError


class LinearHead(nn.Linear):
    """A linear layer from features (B, D) to logits (B, K)."""

    @property
    def config(self) -> dict[str, int]:
        """Return the settings that `load` needs in addition to the weights."""
        return {"features": self.in_features, "classes": self.out_features}

    @classmethod
    def of(cls, layer: nn.Linear) -> "LinearHead":
        """Return a head with the weights of `layer`, on the CPU."""
        head = cls(layer.in_features, layer.out_features)
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
        head.load_state_dict({"weight": layer.weight.detach().cpu(), "bias": bias.detach().cpu()})
        return head.eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Write head.safetensors, then head.json, each whole."""
        state: Mapping[str, Tensor] = self.state_dict()
        write_whole(Path(folder) / "head.safetensors", to_bytes({k: v.contiguous() for k, v in state.items()}))
        write_whole(Path(folder) / "head.json", json.dumps(self.config))

    @classmethod
    def load(cls, folder: str | Path) -> "LinearHead":
        """Return the head that `save` wrote, in eval mode. Raises UserError if it is missing or damaged."""
        try:
            config: dict[str, Any] = json.loads((Path(folder) / "head.json").read_text())
            head = cls(config["features"], config["classes"])
            head.load_state_dict(load_file(Path(folder) / "head.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: the teacher's last layer is missing or damaged ({error})") from None
        return head.eval().requires_grad_(False)
