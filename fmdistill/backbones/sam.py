"""SAM's own preprocessing and its official networks, loaded without executing anything."""

# Legend: B images, S the padded square's side, g = S / stride tokens per side; sizes are (h, w) of the resized image.

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional as F

from fmdistill.backbones.checkpoints import read_state
from fmdistill.backbones.pixels import Picture, as_image
from fmdistill.files import file_hash
from fmdistill.registry import UserError, suggest

PIXEL_MEAN = (123.675, 116.28, 103.53)
RESIZE = {True: "longest side, PIL bilinear", False: "longest side, torch uint8 bilinear antialias"}  # by `exact`
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class SamPreprocess:
    """Resizes the longest side to `image_size` and pads right and bottom, as SAM does.

    With `exact`, PIL resizes, bit for bit as in SAM's training; otherwise torch does, on uint8, within one grey level
    of PIL and several times as fast on a CPU with AVX2.
    """

    image_size: int = 1024
    stride: int = 16
    exact: bool = True

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return (h, w) after the resize; a side never falls below one pixel."""
        scale = self.image_size * 1.0 / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def prepare(self, image: Picture) -> tuple[Tensor, tuple[int, int]]:
        """Return uint8 pixels (3, S, S) in RGB, zero-padded at the right and bottom, and the resized (h, w)."""
        height, width = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
        h, w = self.resized(height, width)
        # torch 2.15's kernel for CPUs without AVX2 is wrong if the result is one pixel wide
        resize = _resize_by_pil if self.exact or w == 1 else _resize_by_torch
        padded = np.zeros((3, self.image_size, self.image_size), np.uint8)
        padded[:, :h, :w] = resize(image, h, w).transpose(2, 0, 1)  # by numpy: torch would start threads for it
        return torch.from_numpy(padded), (h, w)

    def normalize(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Return uint8 pixels (B, 3, S, S) as float32 (x - mean) / std; padded pixels are exactly 0."""
        mean = torch.tensor(PIXEL_MEAN, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(PIXEL_STD, device=pixels.device).view(-1, 1, 1)
        real = self._inside(sizes.to(pixels.device), self.image_size, 1)
        return ((pixels - mean) / std).masked_fill(~real[:, None], 0.0)

    def valid(self, sizes: Tensor) -> Tensor:
        """Return bool (B, g, g): a token is valid if it holds any real pixel."""
        return self._inside(sizes, self.image_size // self.stride, self.stride)

    def real_cells(self, sizes: Tensor, side: int) -> Tensor:
        """Return bool (B, `side`, `side`): whether a cell of such a grid over the padded image holds any real pixel."""
        return self._inside(sizes, side, self.image_size // side)

    def to_json(self) -> dict[str, Any]:
        """Return what determines the network's input, for a manifest."""
        return {
            "name": "sam",
            "image_size": self.image_size,
            "stride": self.stride,
            "resize": RESIZE[self.exact],
            "mean": list(PIXEL_MEAN),
            "std": list(PIXEL_STD),
            "padding": "right and bottom, 0 after normalisation",
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "SamPreprocess":
        """Return the preprocessing that `to_json` described. Raises UserError for any other description."""
        size, stride = stored.get("image_size"), stored.get("stride")
        preprocess = None
        if isinstance(size, int) and isinstance(stride, int) and 0 < stride <= size:
            preprocess = cls(size, stride, stored.get("resize") == RESIZE[True])
        if preprocess is None or preprocess.to_json() != dict(stored):
            raise UserError(f"preprocessing {dict(stored)!r}: not the 'sam' preprocessing of this version")
        return preprocess

    @staticmethod
    def _inside(sizes: Tensor, side: int, step: int) -> Tensor:
        starts = torch.arange(side, device=sizes.device) * step
        inside_B2N = starts < sizes[:, :, None]
        return inside_B2N[:, 0, :, None] & inside_B2N[:, 1, None, :]


def _resize_by_pil(picture: Picture, height: int, width: int) -> np.ndarray:
    image = as_image(picture)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _resize_by_torch(picture: Picture, height: int, width: int) -> np.ndarray:
    if isinstance(picture, Image.Image) or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
        picture = np.array(as_image(picture).convert("RGB"))
    # Channels last in memory: for this order torch has a uint8 kernel that runs in the caller's threads.
    x_1CHW = torch.from_numpy(np.require(picture, requirements=["C", "W"])).permute(2, 0, 1)[None]
    resized = F.interpolate(x_1CHW, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


PUBLISHED = "https://dl.fbaipublicfiles.com/segment_anything/"
OFFICIAL = {
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_h": "sam_vit_h_4b8939.pth",
}
SHA256 = {
    "sam_vit_b_01ec64.pth": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam_vit_l_0b3195.pth": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam_vit_h_4b8939.pth": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}
_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}


def build_sam(kind: Literal["vit_b", "vit_l", "vit_h"], weights: str | Path | None) -> Sam:
    """Return segment_anything's network `kind` with the checkpoint `weights`, on the CPU in eval mode.

    Raises UserError if the file is missing, damaged, not a state dict, or another network's.
    """
    if kind not in OFFICIAL:
        raise UserError(f"teacher '{kind}': unknown SAM.{suggest(kind, OFFICIAL)}")
    return sam_of_state(kind, read_checkpoint(_existing(kind, weights)), f"teacher.weights={weights}")


def sam_of_state(kind: str, state: Mapping[str, Tensor], where: str) -> Sam:
    """Return segment_anything's network `kind` with the weights `state`, on the CPU in eval mode.

    Raises UserError, which begins with `where`, if they do not fit.
    """
    sam = sam_model_registry[kind]()
    _check_fits(state, sam, kind, where)
    sam.load_state_dict(state)
    return sam.eval()


def kind_of_state(state: Mapping[str, Tensor]) -> str | None:
    """Return the official network, such as "vit_b", of which `state` are the weights; None if it is none."""
    positions = state.get("image_encoder.pos_embed")
    return None if positions is None else _WIDTHS.get(positions.shape[-1])


def read_checkpoint(path: Path, where: str | None = None) -> dict[str, Tensor]:
    """Return the state dict in a file. Raises UserError if it has the name of a file of Meta's, but not its sha256.

    Messages begin with `where`, by default the setting that names the file.
    """
    where = where or f"teacher.weights={path}"
    expected = SHA256.get(path.name)
    if expected and (actual := file_hash(path)) != expected:
        raise UserError(
            f"{where}: sha256 is {actual[:12]}..., Meta's file has {expected[:12]}...: "
            f"damaged or incomplete; download {PUBLISHED}{path.name} again (or rename your own weights)"
        )
    return read_state(path, where)


def _existing(kind: str, weights: str | Path | None) -> Path:
    way_out = f"Meta publishes it at {PUBLISHED}{OFFICIAL[kind]}; name the downloaded file with teacher.weights=PATH"
    if weights is None or str(weights) in ("", "none"):
        raise UserError(f"teacher sam_{kind}: teacher.weights is not set. {way_out}")
    if not Path(weights).is_file():
        raise UserError(f"teacher.weights={weights}: no such file. {way_out}")
    return Path(weights)


def _check_fits(state: Mapping[str, Tensor], sam: Sam, kind: str, where: str) -> None:
    expected, other = sam.state_dict(), kind_of_state(state)
    if other and other != kind:
        raise UserError(f"{where}: contains SAM {other}, not {kind}; set teacher.name=sam_{other}")
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            problem = "lacks"
        elif name not in expected:
            problem = "has the unknown"
        elif state[name].shape != expected[name].shape:
            problem = "has another shape of"
        else:
            continue
        raise UserError(f"{where}: not a SAM {kind} checkpoint, it {problem} '{name}'")
