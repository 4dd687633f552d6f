"""Decoded pictures, and the normalisation and masks of square crops."""

# Legend: B images, S the square's side, g = S / stride tokens per side.

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RGB = tuple[float, float, float]
Picture = Image.Image | np.ndarray  # arrays are uint8 (H, W, 3) in RGB, as `images.decode` returns them


def as_image(picture: Picture) -> Image.Image:
    """Return the picture as a PIL image, without changing its mode."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def standardise(pixels: Tensor, mean: RGB, std: RGB) -> Tensor:
    """Return uint8 pixels (B, 3, S, S) as float32 (x / 255 - mean) / std, by torchvision's arithmetic."""
    mean_311, std_311 = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (mean, std))
    return (pixels.float() / 255 - mean_311) / std_311


def all_valid(sizes: Tensor, grid: int) -> Tensor:
    """Return bool (B, g, g), all True, for the (B, 2) sizes of B crops: a crop has no padding."""
    return torch.ones(len(sizes), grid, grid, dtype=torch.bool, device=sizes.device)
