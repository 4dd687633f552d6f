"""Predict masks of points and boxes with a student's embedding and its head, as segment_anything does."""

# Legend: B images or prompts, K points of a prompt, M masks, S the square's side, C channels, g tokens a side,
# n = 4 g the low resolution, H, W height and width of the image.

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import Tensor, nn

from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import PIXEL_MEAN, PIXEL_STD
from fmdistill.predict.pixels import ImageLike, rgb
from fmdistill.registry import UserError


class StudentEncoder(nn.Module):
    """A student in the place of SAM's image encoder: it returns a tensor, and states its image's side as `img_size`."""

    def __init__(self, student: nn.Module, head: PromptHead) -> None:
        super().__init__()
        self.student = student
        self.img_size: int = head.config["image_size"]
        grid = head.config["image_embedding_size"]
        self._expected = (head.config["embed_dim"], grid, grid)

    def forward(self, image_B3SS: Tensor) -> Tensor:
        """Return the embedding (B, C, g, g) of normalised images. Raises UserError if it does not fit the head."""
        embedding = self.student(image_B3SS)["embedding"]
        if tuple(embedding.shape[1:]) != self._expected:
            raise UserError(
                f"{type(self.student).__name__}: gives an embedding of {tuple(embedding.shape[1:])}, but the teacher's "
                f"head takes {self._expected}; use a student of the teacher's own embedding"
            )
        return embedding


class WholeSam(nn.Module):
    """A SAM with an image encoder and a prompt head of its own, called as a student is."""

    def __init__(self, encoder: nn.Module, head: PromptHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.image_size: int = head.config["image_size"]

    def forward(self, image_B3SS: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": (B, C, g, g)} of normalised images."""
        return {"embedding": self.encoder(image_B3SS)}


def as_sam(student: nn.Module, head: PromptHead) -> Sam:
    """Return segment_anything's Sam, in eval mode, with the student as its image encoder; all weights are shared.

    The student maps normalised images (B, 3, S, S) to {"embedding": (B, C, g, g)}.
    """
    encoder: Any = StudentEncoder(student, head)
    sam = Sam(encoder, head.prompt_encoder, head.mask_decoder, list(PIXEL_MEAN), list(PIXEL_STD))
    return sam.eval().requires_grad_(False)


class MaskPredictor(SamPredictor):
    """segment_anything's SamPredictor, which also takes an image as a path or a PIL image, and prompts as lists."""

    def as_sam(self) -> Sam:
        """Return the network, for code that takes a segment_anything model, such as SamAutomaticMaskGenerator."""
        return self.model

    def set_image(self, image: ImageLike, image_format: str = "RGB") -> None:
        """Compute the embedding of an image, for any number of calls of `predict`.

        `image` is a path, a PIL image, or an array uint8 (H, W, 3); the channels of an array are in the order
        `image_format`, "RGB" or "BGR". Raises UserError for anything else, and for a file that cannot be decoded.
        """
        if image_format not in ("RGB", "BGR"):
            raise UserError(f"image_format={image_format!r}: expected RGB or BGR")
        super().set_image(rgb(image), image_format if isinstance(image, np.ndarray) else "RGB")

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Any:
        """Return masks bool (M, H, W), their predicted IoU (M,) and low-resolution logits (M, n, n) of one prompt.

        `point_coords` (K, 2) and `box` (x, y, x, y) are in pixels of the image; `point_labels` (K,) are 1 for
        foreground and 0 for background. `mask_input` (1, n, n) are logits that an earlier call returned. M is 3, or 1
        without `multimask_output`. Raises UserError if the prompt has another shape, RuntimeError without an image.
        """
        points, labels, corners, mask = (_array(v) for v in (point_coords, point_labels, box, mask_input))
        if (points is None) != (labels is None):
            raise UserError("point_coords and point_labels: give both, a label for each point")
        if points is not None and (points.ndim != 2 or points.shape[1] != 2 or labels.shape != points.shape[:1]):
            raise UserError(
                f"point_coords of {points.shape}, point_labels of {labels.shape}: expected (K, 2) and (K,); several "
                f"prompts at once are for predict_torch"
            )
        if corners is not None and corners.size != 4:
            raise UserError(f"box of {corners.shape}: expected 4 numbers; several boxes at once are for predict_torch")
        return super().predict(points, labels, corners, mask, multimask_output, return_logits)


def torch_predictor(student: nn.Module, head: PromptHead, device: torch.device) -> MaskPredictor:
    """Return the predictor of a student and its head, the teacher's or its own; UserError if their sizes differ."""
    for setting, of_student, of_head in (
        ("image side is", getattr(student, "image_size", None), head.config["image_size"]),
        ("embedding has", getattr(student, "out_channels", None), head.config["embed_dim"]),
    ):
        if of_student not in (None, of_head):
            raise UserError(
                f"the student's {setting} {of_student}, but its teacher's head takes {of_head}; use a student of the "
                f"teacher's own embedding"
            )
    return MaskPredictor(as_sam(student, head).to(device))


def _array(values: ArrayLike | None) -> Any:
    return None if values is None else np.asarray(values)
