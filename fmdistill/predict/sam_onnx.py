"""Predict masks by SAM's encoder and decoder as ONNX files, with segment_anything.SamPredictor's methods."""

# Legend: N points, M masks, C channels, g tokens per side, n the low resolution, H x W pixels of the image.

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.nn import functional as F

from fmdistill.backbones.sam import SamPreprocess
from fmdistill.predict.artefact import Artefact
from fmdistill.predict.onnx_session import Session
from fmdistill.predict.pixels import ImageLike, rgb
from fmdistill.predict.sam_layouts import SamLayout
from fmdistill.registry import UserError

PAD = ((0.0, 0.0), -1.0)  # the point that SAM adds to prompts without a box


def open_artefact(artefact: Artefact, device: str = "cpu", threads: int = 0) -> "OnnxSamPredictor":
    """Return the predictor of an exported folder, which runs on `threads` threads, 0 for one a core.

    Raises UserError if a file is damaged or `device` is not "cpu".
    """
    if device not in ("cpu", "auto"):
        raise UserError(f"device={device}: exported ONNX files are run on the CPU; load the run itself for a GPU")
    try:
        layout = SamLayout.from_json(artefact.model["layout"])
        encoder, decoder = artefact.model["encoder"], artefact.model["decoder"]
    except KeyError as error:
        raise UserError(f"{artefact.folder}: its JSON has no {error} of a SAM; export the run again") from None
    return OnnxSamPredictor(artefact.path(encoder), artefact.path(decoder), artefact.model, layout, threads)


class OnnxSamPredictor:
    """segment_anything.SamPredictor on ONNX Runtime.

    Files that choose one mask themselves give one, whatever `multimask_output` is.
    """

    def __init__(self, encoder: Path, decoder: Path, model: Mapping[str, Any], layout: SamLayout, threads: int = 0):
        self.layout, self.image_size, self.grid = layout, int(model["image_size"]), int(model["grid"])
        self.preprocess = SamPreprocess(self.image_size, self.image_size // self.grid)
        self._encoder, self._decoder = Session(encoder, threads), Session(decoder, threads)
        self.reset_image()

    def reset_image(self) -> None:
        """Forget the image."""
        self.is_image_set, self.features, self.original_size = False, {}, (0, 0)

    def set_image(self, image: ImageLike, image_format: str = "RGB") -> None:
        """Embed an image: uint8 (H, W, 3), a PIL image, or the path of one. Raises UserError if it is none."""
        if image_format not in ("RGB", "BGR"):
            raise UserError(f"image_format={image_format}: expected RGB or BGR")
        pixels = rgb(image)
        pixels = pixels if image_format == "RGB" else np.ascontiguousarray(pixels[..., ::-1])
        self.reset_image()
        self.features = self.encode(self.encoder_input(pixels))
        self.original_size, self.is_image_set = (pixels.shape[0], pixels.shape[1]), True

    def get_image_embedding(self) -> np.ndarray:
        """Return the embedding (1, C, g, g) of the image that was set."""
        self._require_image()
        return self.features["image_embeddings"]

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return masks (M, H, W), bool or logits, predicted IoU (M,) and low-res logits (M, n, n).

        Points (N, 2) are xy in pixels, labels 1 or 0, the box is xyxy, and `mask_input` (1, n, n) comes from an earlier
        call. Raises UserError if no image was set or the files take no such prompt.
        """
        self._require_image()
        points, labels = self._tokens(point_coords, point_labels, box)
        low, iou, masks = self.decode(self.features, points, labels, mask_input, self.size)
        if not self.layout.single:
            low, iou, masks = (
                self._chosen(low, multimask_output),
                self._chosen(iou, multimask_output),
                (self._chosen(masks, multimask_output)),
            )
        masks = self._uncanvas(masks)
        return (masks if return_logits else masks > 0), iou, low

    def as_sam(self) -> Any:
        """Raise a UserError: ONNX files are no PyTorch network."""
        raise UserError("as_sam: ONNX files cannot become a PyTorch network; load the run, or its mobilesam export")

    @property
    def size(self) -> tuple[int, int]:
        """The (H, W) that masks are computed for: the image's, or that of the canvas that the layout's tools draw."""
        return self.layout.canvas or self.original_size

    def encoder_input(self, pixels: np.ndarray) -> np.ndarray:
        """Return what the encoder is given for uint8 pixels (H, W, 3), as the layout's own programs prepare it."""
        if self.layout.raw:
            return _on_canvas(pixels, self.size if self.layout.canvas else pixels.shape[:2]).astype(np.float32)
        prepared, size = self.preprocess.prepare(pixels)
        return self.preprocess.normalize(prepared[None], torch.tensor([size])).numpy()

    def encode(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Return the encoder's outputs by name."""
        return self._encoder({self.layout.image: image})

    def decode(
        self,
        features: Mapping[str, np.ndarray],
        points: np.ndarray,
        labels: np.ndarray,
        mask: np.ndarray | None,
        size: tuple[int, int],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run the decoder on points (N, 2) in the layout's frame; return low-res logits, IoU, and logits at `size`."""
        if self.layout.batched:
            return self._decode_batched(features, points, labels, mask, size)
        side = self.layout.mask_side or 4 * self.grid
        given = np.zeros((1, 1, side, side), np.float32) if mask is None else _mask(mask, side)
        outputs = self._decoder(
            {
                "image_embeddings": features["image_embeddings"],
                "point_coords": points[None].astype(np.float32),
                "point_labels": labels[None].astype(np.float32),
                "mask_input": given,
                "has_mask_input": np.full(self.layout.flag_shape, mask is not None, np.float32),
                self.layout.size: np.array(size, self.layout.size_type).reshape(self.layout.size_shape),
            }
        )
        return outputs["low_res_masks"][0], outputs["iou_predictions"][0], outputs[self.layout.masks][0]

    def _decode_batched(
        self, features: Mapping[str, np.ndarray], points: np.ndarray, labels: np.ndarray, mask: Any, size: tuple
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if mask is not None:
            raise UserError("mask_input: the transformers layout takes no mask; export the run as onnx")
        feeds = {"input_points": points[None, None].astype(np.float32), "input_labels": labels[None, None]}
        outputs = self._decoder({**feeds, **features, "input_labels": feeds["input_labels"].astype(np.int64)})
        low = outputs["pred_masks"][0, 0]
        (h, w), side = self.preprocess.resized(*size), self.image_size
        logits = F.interpolate(torch.from_numpy(low)[None], (side, side), mode="bilinear")[..., :h, :w]
        return low, outputs["iou_scores"][0, 0], F.interpolate(logits, size, mode="bilinear")[0].numpy()

    def _tokens(self, coords: Any, labels: Any, box: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return points (N, 2) in the layout's frame and labels (N,), a box as two points, and SAM's padding."""
        points, kinds = np.zeros((0, 2)), np.zeros(0)
        if coords is not None:
            points = np.asarray(coords, np.float64).reshape(-1, 2)
            if labels is None or len(np.asarray(labels).reshape(-1)) != len(points):
                raise UserError(f"point_labels={labels}: expected one label for each of {len(points)} points")
            kinds = np.asarray(labels, np.float64).reshape(-1)
        if box is not None:
            if np.size(box) != 4:
                raise UserError(f"box={box}: expected four numbers, left, top, right, bottom")
            points = np.concatenate([points, np.asarray(box, np.float64).reshape(2, 2)])
            kinds = np.concatenate([kinds, [2.0, 3.0]])
        if not len(points):
            raise UserError("predict: neither points nor a box; give one")
        points = points * self._scale()
        # With one mask the tools add the point always: by the number of points the decoder chooses the mask.
        if not self.layout.pads and (box is None or self.layout.single):
            points, kinds = np.concatenate([points, [PAD[0]]]), np.concatenate([kinds, [PAD[1]]])
        return points, kinds

    def _scale(self) -> np.ndarray:
        """Return the factors of x and y from the image's pixels to those of the layout's frame."""
        height, width = self.original_size
        if self.layout.canvas:
            return np.full(2, _canvas_scale(height, width, self.layout.canvas))
        h, w = self.preprocess.resized(height, width)
        return np.array([w / width, h / height])

    def _chosen(self, values: np.ndarray, multimask: bool) -> np.ndarray:
        if self.layout.batched:
            if not multimask:
                raise UserError("multimask_output=False: the transformers layout has no such mask; export it as onnx")
            return values
        return values[1:] if multimask else values[:1]

    def _uncanvas(self, masks: np.ndarray) -> np.ndarray:
        """Return logits (M, H, W) at the image's size of logits on the canvas."""
        if not self.layout.canvas:
            return masks
        height, width = self.original_size
        scale = _canvas_scale(height, width, self.layout.canvas)
        own = masks[:, : max(1, round(height * scale)), : max(1, round(width * scale))]
        return F.interpolate(torch.from_numpy(own.copy())[None], (height, width), mode="bilinear")[0].numpy()

    def _require_image(self) -> None:
        if not self.is_image_set:
            raise UserError("predict: no image was set; call set_image first")


def _canvas_scale(height: int, width: int, canvas: tuple[int, int]) -> float:
    return min(canvas[0] / height, canvas[1] / width)


def _on_canvas(pixels: np.ndarray, canvas: tuple[int, ...]) -> np.ndarray:
    """Return the pixels resized into the upper left corner of a black canvas (h, w)."""
    scale = _canvas_scale(pixels.shape[0], pixels.shape[1], (canvas[0], canvas[1]))
    h, w = max(1, round(pixels.shape[0] * scale)), max(1, round(pixels.shape[1] * scale))
    drawn = np.zeros((canvas[0], canvas[1], 3), np.uint8)
    drawn[:h, :w] = np.asarray(PIL.Image.fromarray(pixels).resize((w, h), PIL.Image.Resampling.BILINEAR))
    return drawn


def _mask(mask: np.ndarray, side: int) -> np.ndarray:
    if np.size(mask) != side * side:
        raise UserError(
            f"mask_input: has the shape {np.shape(mask)}, expected (1, {side}, {side}) from an earlier call"
        )
    return np.asarray(mask, np.float32).reshape(1, 1, side, side)
