"""Make all masks of an image as segment_anything's automatic mask generator does, with less work."""

# Legend: P points, M masks of a prompt, X masks of a batch, C channels, g tokens a side, n = 4 g the low resolution,
# H, W height and width of the image or crop.

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from segment_anything.utils.amg import (
    MaskData,
    calculate_stability_score,
    is_box_near_crop_edge,
    uncrop_masks,
)
from torch import Tensor, nn

from fmdistill.backbones.fast_decoder import image_decoder
from fmdistill.backbones.promptable import PromptHead
from fmdistill.predict.sam import as_sam

Size = tuple[int, int]


class Counts(list):
    """The counts of an RLE, which a deep copy shares: MaskData copies every mask, and nothing changes them."""

    def __deepcopy__(self, memo: dict) -> "Counts":
        """Return these counts themselves."""
        return self


class MaskGenerator(SamAutomaticMaskGenerator):
    """segment_anything's SamAutomaticMaskGenerator, with its settings, its masks and their order, but faster.

    Prompts share the decoder's work on the image, and a mask is upsampled only if its predicted IoU passes. Logits
    differ by rounding (about 1e-5), so that a mask may differ in a pixel whose logit is that near to the threshold.
    """

    def __init__(self, model: Sam, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.head = PromptHead.from_sam(model)

    def _process_batch(self, points: np.ndarray, im_size: Size, crop_box: list[int], orig_size: Size) -> MaskData:
        device, features = self.predictor.device, self.predictor.features
        assert features is not None
        xy_P2 = torch.as_tensor(self.predictor.transform.apply_coords(points, im_size), device=device)
        labels = torch.ones(len(xy_P2), 1, dtype=torch.int, device=device)
        decode = image_decoder(self.head, features[0])
        logits_PMnn, predicted_PM = decode(xy_P2[:, None], labels, multimask=True)
        data = MaskData(
            logits=logits_PMnn.flatten(0, 1),
            iou_preds=predicted_PM.flatten(0, 1),
            points=torch.as_tensor(points.repeat(logits_PMnn.shape[1], axis=0)),
        )
        if self.pred_iou_thresh > 0:
            data.filter(data["iou_preds"] > self.pred_iou_thresh)
        whole = MaskData()
        for piece in self._pieces(data):
            whole.cat(self._finish(piece, crop_box, orig_size))
        return whole

    def _pieces(self, data: MaskData) -> Iterator[MaskData]:
        """Yield the masks in pieces whose upsampled logits stay in a CPU's cache; one empty piece if it has none."""
        size = self.predictor.model.image_encoder.img_size
        pixels = 2**28 if data["logits"].is_cuda else 2**20
        step = max(1, pixels // max(int(np.prod(self.predictor.original_size)), size**2))
        for start in range(0, max(len(data["logits"]), 1), step):
            yield MaskData(**{name: values[start : start + step] for name, values in data.items()})

    def _finish(self, data: MaskData, crop_box: list[int], orig_size: Size) -> MaskData:
        """Upsample the logits, filter them by stability and by the crop's edge, and encode the masks."""
        threshold, (height, width) = self.predictor.model.mask_threshold, orig_size
        predictor: Any = self.predictor
        logits_P1nn = data["logits"].unsqueeze(1)
        data["masks"] = self.head.upsample(logits_P1nn, predictor.input_size, predictor.original_size).squeeze(1)
        del data["logits"]
        data["stability_score"] = calculate_stability_score(data["masks"], threshold, self.stability_score_offset)
        if self.stability_score_thresh > 0:
            data.filter(data["stability_score"] >= self.stability_score_thresh)
        data["masks"] = data["masks"] > threshold
        data["boxes"] = _boxes(data["masks"])
        data.filter(~is_box_near_crop_edge(data["boxes"], crop_box, [0, 0, width, height]))
        data["rles"] = _rles(uncrop_masks(data["masks"], crop_box, height, width))
        del data["masks"]
        return data


def _boxes(masks_XHW: Tensor) -> Tensor:
    """Return what segment_anything's batched_mask_to_box does: xyxy of the first and last pixels, zeros if empty."""
    if not len(masks_XHW):
        return torch.zeros(0, 4, dtype=torch.int64, device=masks_XHW.device)
    bytes_XHW = masks_XHW.view(torch.uint8)  # whose maximum is ten times as fast as that of bool
    rows_XH, columns_XW = bytes_XHW.amax(2), bytes_XHW.amax(1)
    first = [line.argmax(1) for line in (columns_XW, rows_XH)]
    last = [line.shape[1] - 1 - line.flip(1).argmax(1) for line in (columns_XW, rows_XH)]
    return torch.stack([*first, *last], dim=1) * rows_XH.amax(1, keepdim=True)


def _rles(masks_XHW: Tensor) -> list[dict[str, Any]]:
    """Return what segment_anything's mask_to_rle_pytorch does: each mask's RLE, its counts column by column."""
    size = list(masks_XHW.shape[1:])
    rles = []
    for mask_HW in masks_XHW.cpu().numpy():
        flat = np.ascontiguousarray(mask_HW.T).ravel()
        changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
        rles.append({"size": size, "counts": Counts([0, *runs] if flat[0] else runs)})
    return rles


class KnownEmbedding(nn.Module):
    """A student that gives one embedding (C, g, g) for every image."""

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, image_B3SS: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": (B, C, g, g)}."""
        return {"embedding": self.embedding.expand(len(image_B3SS), -1, -1, -1)}


def masks_of_embedding(head: PromptHead, embedding: Tensor, original: Size, **settings: Any) -> list[dict[str, Any]]:
    """Return what `MaskGenerator(...).generate` does for an image (H, W) whose embedding (C, g, g) is known.

    `settings` are the generator's; crops have other embeddings, so that `crop_n_layers` must be 0.
    """
    assert not settings.get("crop_n_layers")
    sam = as_sam(KnownEmbedding(embedding), head).to(embedding.device)
    return MaskGenerator(sam, **settings).generate(np.zeros((*original, 3), np.uint8))
