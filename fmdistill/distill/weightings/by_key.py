"""Fixed weights, listed in a file."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import mean_one_in_batch
from fmdistill.registry import UserError
from fmdistill.text import read_text


@dataclass(frozen=True)
class ByKey:
    """Weighs each image, and all its patches alike, by the weight of its key in the JSON file `weights`.

    The file is {key: weight}. Use it for weights computed by another run: 1 / variance of a trained PAD ("weights from
    PAD" in its paper's ablation), or the two-stage IPWD. Weights are normalised to mean one over one process's batch,
    so an image's weight depends on its batch; with `normalize` false they are the file's own. Outside of training, such
    as in validation, an unlisted image has weight one.
    """

    weights: str
    normalize: bool = True
    listed: dict[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "listed", _read(Path(self.weights)))

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights of the distance's shape, (B,) or (B, N); zero for invalid patches.

        Raises UserError if an image's key is not in the file, while training.
        """
        if len(seen.keys) != len(distance):
            raise UserError(
                f"weighting.weights={self.weights}: weighs by the images' keys, but this distance compares all images "
                f"of the optimizer step, and those of other processes and accumulated batches are not known by key; "
                f"use one process with train.accumulate=1, or weigh another term"
            )
        unlisted = [key for key in seen.keys if key not in self.listed]
        if unlisted and seen.epoch is not None:
            raise UserError(
                f"weighting.weights={self.weights}: has no weight for image '{unlisted[0]}', nor for "
                f"{len(unlisted) - 1} others of this batch; write the file from the images that the recipe trains on"
            )
        weight_B = torch.tensor([self.listed.get(key, 1.0) for key in seen.keys], dtype=torch.float64)
        weight_B = mean_one_in_batch(weight_B) * (weight_B > 0) if self.normalize else weight_B
        weight_B = weight_B.to(distance)
        if distance.dim() == 1:
            return weight_B
        assert seen.valid is not None
        return weight_B[:, None] * seen.valid


def _read(path: Path) -> dict[str, float]:
    try:
        listed = json.loads(read_text(path, "weighting.weights"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"weighting.weights={path}: not a readable JSON file: {error}; write {{key: weight}} to it"
        ) from error
    if not isinstance(listed, dict):
        raise UserError(f"weighting.weights={path}: contains a {type(listed).__name__}; expected {{key: weight}}")
    for key, weight in listed.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(
                f"weighting.weights={path}: image '{key}' has weight {weight!r}; expected a number of at least 0"
            )
    return listed
