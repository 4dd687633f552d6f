"""Standardise a teacher's targets, and fold the inverse into the student's last layer.

A term compares z = R (x - mean) / scale of the teacher's output x with the same of the student's. The student's last
layer learns in these units: `TeacherScale` maps its raw output back to x by as much of the inverse as that layer can
hold, and `fold` writes this map into the layer at the end, so that nothing of it is left in the saved student.
"""

# Legend: B images, C channels or dimensions of an output.

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fmdistill.cache.moments import Padding, channel_moments, covariance
from fmdistill.cache.reader import Cache
from fmdistill.distill.hadamard import rotation
from fmdistill.registry import UserError

Kind = Literal["channel", "phi_s"]
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)


class Standardizer(nn.Module):
    """The map z = R (x - mean) / scale over the channels of an output (B, C) or (B, C, H, W), and its inverse.

    R is orthogonal, the identity if `rotation_CC` is None. The buffers are part of a checkpoint, so that a resumed run
    goes on with the same targets.
    """

    mean_C: Tensor
    scale_C: Tensor
    rotation_CC: Tensor | None

    def __init__(self, mean_C: np.ndarray, scale_C: np.ndarray, rotation_CC: np.ndarray | None = None) -> None:
        super().__init__()
        for name, value in (("mean_C", mean_C), ("scale_C", scale_C), ("rotation_CC", rotation_CC)):
            self.register_buffer(name, None if value is None else torch.from_numpy(np.array(value, np.float32)))

    def forward(self, output: Tensor) -> Tensor:
        """Return z for the output x."""
        centred = (output - across(self.mean_C, output)) / across(self.scale_C, output)
        return centred if self.rotation_CC is None else rotated(self.rotation_CC, centred)

    def inverse(self, standardised: Tensor) -> Tensor:
        """Return the output x for its z."""
        centred = standardised if self.rotation_CC is None else rotated(self.rotation_CC.T, standardised)
        return centred * across(self.scale_C, centred) + across(self.mean_C, centred)


def statistics(cache: Cache, output: str, padding: Padding, kind: Kind, gpu: bool = False) -> Standardizer:
    """Return the standardizer of a teacher's `output` from the training images of its cache.

    "channel" divides each channel by its deviation. "phi_s" is PHI Standardization (Ranzinger et al., "PHI-S:
    Distribution Balancing for Label-Free Multi-Teacher Distillation", arXiv:2410.01680): R = H U^T of the covariance's
    eigenvectors U and a Hadamard matrix H, and one scale, the root of the mean eigenvalue, so that each dimension of z
    has the variance one. Its covariance may take a pass over the cache, with `gpu` on the GPU. `padding` is that of the
    term. Raises UserError if the cache has no such output.
    """
    if kind == "channel":
        moments = channel_moments(cache, output, padding)
        return Standardizer(moments.mean_C, np.where(moments.deviation_C > 0, moments.deviation_C, 1.0))
    values = covariance(cache, output, padding, gpu)
    scale, rotation_CC = phi_s(values.covariance_CC)
    return Standardizer(values.mean_C, np.full(len(rotation_CC), scale), rotation_CC)


def phi_s(covariance_CC: np.ndarray) -> tuple[float, np.ndarray]:
    """Return PHI-S's scale and rotation (C, C), float64, for a covariance matrix.

    An order without a known Hadamard matrix, such as 30, gets `rotation`'s other construction, which levels the
    variances as well; RADIO's code takes a random rotation, which levels them about.
    """
    variance_C, vector_CC = np.linalg.eigh(covariance_CC)
    variance_C = variance_C.clip(0)
    largest_C = np.abs(vector_CC).argmax(0)
    vector_CC = vector_CC * np.sign(vector_CC[largest_C, np.arange(len(largest_C))])  # eigenvectors have no sign
    return float(np.sqrt(variance_C.mean())), rotation(variance_C) @ vector_CC.T


class TeacherScale:
    """Maps a student's raw output to the teacher's scale, as far as its last layer can hold the map.

    A layer with a weight and a bias for each channel, such as a LayerNorm, holds mean and scale; a linear layer or a
    convolution also the rotation, and without a bias no mean. What a layer cannot hold is part of the comparison alone:
    a term applies all of the standardizer to both sides, so the loss is the same whatever the layer holds.
    """

    def __init__(self, layer: nn.Module, standardizer: Standardizer, where: str = "student") -> None:
        self.layer, self.standardizer = layer, standardizer
        weight, matrix = getattr(layer, "weight", None), isinstance(layer, nn.Linear | nn.Conv2d)
        channels = len(standardizer.mean_C)
        norm = isinstance(layer, NORMS) and getattr(layer, "bias", None) is not None
        if not isinstance(weight, Tensor) or len(weight) != channels or not (matrix or norm):
            raise UserError(
                f"{where}: a standardised target of {channels} channels folds into a linear layer, a convolution, or a "
                f"norm with weight and bias, but the last layer is {layer}; set standardize=none"
            )
        self.shifts = getattr(layer, "bias", None) is not None
        self.rotates = matrix and getattr(layer, "groups", 1) == 1 and standardizer.rotation_CC is not None

    def __call__(self, raw: Tensor) -> Tensor:
        """Return the student's output on the teacher's scale for its raw output, (B, C) or (B, C, H, W)."""
        mean_C, scale_C, rotation_CC = self._map(raw.dtype, raw.device)
        output = raw if rotation_CC is None else rotated(rotation_CC.T, raw)
        return output * across(scale_C, output) + across(mean_C, output)

    def fold(self) -> None:
        """Write the map into the layer: it then gives the teacher's scale itself."""
        mean_C, scale_C, rotation_CC = self._map()

        def mapped(value: Tensor) -> Tensor:
            value = value if rotation_CC is None else torch.tensordot(rotation_CC.T, value, 1)
            return value * scale_C.view(-1, *[1] * (value.dim() - 1))

        self._write(mapped, mean_C)

    def unfold(self) -> None:
        """Write the inverse map into the layer, for a student that starts from weights on the teacher's scale."""
        mean_C, scale_C, rotation_CC = self._map()

        def mapped(value: Tensor) -> Tensor:
            value = value / scale_C.view(-1, *[1] * (value.dim() - 1))
            return value if rotation_CC is None else torch.tensordot(rotation_CC, value, 1)

        self._write(mapped, -mapped(mean_C))

    @torch.no_grad()
    def _write(self, mapped: Callable[[Tensor], Tensor], shift_C: Tensor) -> None:
        for name in ("weight", "bias"):
            parameter = getattr(self.layer, name, None)
            if parameter is not None:
                value = mapped(parameter.detach().cpu().double())
                parameter.copy_(value + shift_C if name == "bias" else value)

    def _map(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return mean, scale and rotation, as far as the layer holds them."""
        own = self.standardizer
        mean_C = own.mean_C if self.shifts else torch.zeros_like(own.mean_C)
        rotation_CC = own.rotation_CC.to(device, dtype) if self.rotates and own.rotation_CC is not None else None
        return mean_C.to(device, dtype), own.scale_C.to(device, dtype), rotation_CC


def fold(student: nn.Module, output: str, standardizer: Standardizer) -> None:
    """Fold the inverse of `standardizer` into the last layer of a student that learned `output` in its units."""
    TeacherScale(last_layer(student, output), standardizer).fold()


def last_layer(student: nn.Module, output: str) -> nn.Module:
    """Return the layer that makes a student's `output`; UserError if the student does not state it."""
    name, layers = output.rpartition(".")[2], getattr(student, "last_layers", {})
    if name not in layers:
        raise UserError(
            f"student: {type(student).__name__} does not state the last layer of {name}, into which a standardised "
            f"target is folded; give it a property `last_layers`, such as {{'{name}': self.head}}, or set "
            f"standardize=none"
        )
    return layers[name]


def across(value_C: Tensor, output: Tensor) -> Tensor:
    """Return a value for each channel in a shape that spreads over `output`, (B, C) or (B, C, H, W)."""
    return value_C.view(-1, *[1] * (output.dim() - 2))


def rotated(rotation_CC: Tensor, output: Tensor) -> Tensor:
    """Return `output`, (B, C) or (B, C, H, W), with each vector over the channels multiplied by the matrix."""
    vectors_BCN = output.flatten(2) if output.dim() > 2 else output.unsqueeze(2)
    return torch.matmul(rotation_CC.to(output.dtype), vectors_BCN).reshape(output.shape)
