"""Wrap a student and its teacher's head as the networks that SAM's ONNX files contain."""

# Legend: B images, P prompts, N points, C channels, g tokens per side, n = 4 g the low resolution, S the student's
# side, H x W pixels of an image.

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import PIXEL_MEAN, PIXEL_STD
from fmdistill.predict.sam_layouts import SamLayout

# Parts of the decoder whose float16 is harmless; coordinates and sizes of images need float32.
HALF = ("/transformer/", "/output_upscaling", "/output_hypernetworks_mlps", "/iou_prediction_head", "/mask_downscaling")


class SquareEncoder(nn.Module):
    """The student on images that are normalised and padded already, with 0 or, before, with the grey `padding`."""

    grey: Tensor

    def __init__(self, student: nn.Module, padding: int | None = None):
        super().__init__()
        self.student, self.padding = student, padding
        values = (torch.tensor(float(padding or 0)) - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
        self.register_buffer("grey", values.view(1, 3, 1, 1), persistent=False)

    def forward(self, image_13SS: Tensor) -> Tensor:
        """Return the embedding (1, C, g, g)."""
        if self.padding is not None:
            image_13SS = self._zeros_for_grey(image_13SS)
        return self.student(image_13SS)["embedding"]

    def _zeros_for_grey(self, image_13SS: Tensor) -> Tensor:
        """Return the image with 0 in the last rows and columns, as far as they are all grey."""
        drawn_1SS = ((image_13SS - self.grey).abs() > 1e-3).to(torch.float32).amax(1)
        place_S = torch.arange(1, image_13SS.shape[-1] + 1, dtype=torch.float32)
        rows_S, columns_S = (place_S <= (drawn_1SS.amax(axis) * place_S).max() for axis in (2, 1))
        return image_13SS * (rows_S[:, None] & columns_S[None])


class PixelEncoder(nn.Module):
    """The student on raw pixels (H, W, 3) of 0..255 in RGB, of an image whose longest side is at most `frame`."""

    mean: Tensor
    std: Tensor

    def __init__(self, student: nn.Module, side: int, frame: int):
        super().__init__()
        self.student, self.side, self.frame = student, side, frame
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels_HW3: Tensor) -> Tensor:
        """Return the embedding (1, C, g, g) of the pixels, resized by side / frame, normalised and padded with 0."""
        image = pixels_HW3.permute(2, 0, 1)
        if self.side != self.frame:
            image = self._resized(image)
        image = (image[None] - self.mean) / self.std
        image = F.pad(image, (0, self.side - image.shape[-1], 0, self.side - image.shape[-2]))
        return self.student(image.reshape(1, 3, self.side, self.side))["embedding"]  # a static shape for the graph

    def _resized(self, image_3HW: Tensor) -> Tensor:
        """Return the image with PIL's bilinear filter, as products with two matrices: the tracer has no such resize."""
        height, width = image_3HW.shape[-2:]
        return self._filter(height) @ image_3HW @ self._filter(width).T

    def _filter(self, length: int) -> Tensor:
        step = self.frame / self.side
        out = torch.arange(self.side)[: torch.floor(torch.as_tensor(length) / step + 0.5).to(torch.int64)]
        distance = (torch.arange(length)[None] + 0.5) - (out[:, None] + 0.5) * step
        weight = (1 - distance.abs() / max(step, 1.0)).clamp(min=0)
        return weight / weight.sum(1, keepdim=True)


class PromptTokens(nn.Module):
    """Points and a mask -> what the decoder's transformer attends to."""

    def __init__(self, encoder: PromptEncoder, layout: SamLayout):
        super().__init__()
        self.encoder, self.layout = encoder, layout
        self.side, self.low = encoder.input_image_size[0], encoder.mask_input_size[0]
        self.scale = self.side / (layout.frame or self.side)

    def points(self, points_PN2: Tensor, labels_PN: Tensor) -> Tensor:
        """Return the tokens (P, N, C); labels are 0, 1, 2 and 3 for the corners of a box, and -1 for padding."""
        encoded = self.encoder.pe_layer._pe_encoding((points_PN2 * self.scale + 0.5) / self.side)
        label = labels_PN.unsqueeze(-1)
        tokens = encoded * (label != -1) + self.encoder.not_a_point_embed.weight * (label == -1)
        for i, embedding in enumerate(self.encoder.point_embeddings):
            tokens = tokens + embedding.weight * (label == i)  # type: ignore[operator]
        return tokens

    def no_mask(self) -> Tensor:
        """Return the dense embedding (1, C, 1, 1) that stands for no mask."""
        return self.encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)

    def forward(self, points: Tensor, labels: Tensor, mask: Tensor, flag: Tensor) -> tuple[Tensor, Tensor]:
        """Return sparse (1, N, C) and dense (1, C, g, g) embeddings; a `flag` of 0 or less means no mask."""
        flag = flag.reshape(1, 1, 1, 1).clamp(0, 1)
        if self.layout.any_mask:
            mask = F.interpolate(mask, (self.low, self.low), mode="bilinear", align_corners=False)
        else:
            mask = _shrink(mask, self.low)
        if self.layout.pads:
            points, labels = _padded(points, labels)
        dense = flag * self.encoder.mask_downscaling(mask) + (1 - flag) * self.no_mask()
        return self.points(points, labels), dense


class Upscale(nn.Module):
    """Low-res logits -> logits at an image's own size, by SAM's postprocessing."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, logits: Tensor, size: Tensor) -> Tensor:
        """Return logits (1, M, H, W) for `size`, the two numbers (H, W)."""
        size = size.reshape(2).to(torch.float32)
        h, w = torch.floor(size * (self.side / size.max()) + 0.5).to(torch.int64)  # without the padding
        logits = F.interpolate(logits, (self.side, self.side), mode="bilinear", align_corners=False)
        height, width = size.to(torch.int64)
        return F.interpolate(logits[..., :h, :w], (height, width), mode="bilinear", align_corners=False)  # type: ignore[arg-type]


class OfficialDecoder(nn.Module):
    """segment_anything's SamOnnxModel in a form that traces for every image size, with a layout's differences."""

    def __init__(self, head: PromptHead, layout: SamLayout):
        super().__init__()
        self.head, self.layout = head, layout
        self.prompts = PromptTokens(head.prompt_encoder, layout)
        self.post = Upscale(head.config["image_size"])

    def forward(
        self, embedding: Tensor, points: Tensor, labels: Tensor, mask: Tensor, flag: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return masks (1, M, H, W), predicted IoU (1, M) and low-res masks (1, M, n, n)."""
        sparse, dense = self.prompts(points, labels, mask, flag)
        logits, iou = self.head.decode_batch(embedding, sparse, dense)
        if self.layout.single:
            logits, iou = _select(logits, iou, points.shape[1])
        return self.post(logits, size), iou, _enlarge(logits, self.layout.mask_side)


class BatchedEncoder(nn.Module):
    """The student and the positional encoding of its grid, as transformers' vision_encoder."""

    def __init__(self, student: nn.Module, head: PromptHead):
        super().__init__()
        self.student = student
        self.register_buffer("grid", head.prompt_encoder.get_dense_pe().detach(), persistent=False)

    def forward(self, image_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings and positional embeddings, (B, C, g, g) each."""
        embedding = self.student(image_B3SS)["embedding"]
        return embedding, self.grid.expand(embedding.shape[0], -1, -1, -1)  # type: ignore[operator]


class BatchedDecoder(nn.Module):
    """transformers' prompt_encoder_mask_decoder: P prompts for each of B images, three masks for each prompt."""

    def __init__(self, head: PromptHead, layout: SamLayout):
        super().__init__()
        self.head = head
        self.prompts = PromptTokens(head.prompt_encoder, layout)

    def forward(self, points: Tensor, labels: Tensor, embedding: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted IoU (B, P, 3) and logits (B, P, 3, n, n); a padding point is added to each prompt."""
        batch, prompts = points.shape[0], points.shape[1]
        points = F.pad(points.flatten(0, 1), (0, 0, 0, 1))
        labels = F.pad(labels.flatten(0, 1), (0, 1), value=-1)
        # transformers fills prompts of unequal length with label -10, whose token is zero
        sparse = self.prompts.points(points, labels) * (labels != -10).unsqueeze(-1)
        dense = self.prompts.no_mask().expand(batch * prompts, -1, *embedding.shape[-2:])
        embedding = embedding.unsqueeze(1).expand(-1, prompts, -1, -1, -1).flatten(0, 1)
        grid = grid.unsqueeze(1).expand(-1, prompts, -1, -1, -1).flatten(0, 1)
        decoder = self.head.mask_decoder
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.unsqueeze(0).expand(batch * prompts, -1, -1), sparse], dim=1)
        src = embedding + dense
        out, src_PNC = decoder.transformer(src, grid, tokens)
        upscaled = decoder.output_upscaling(src_PNC.transpose(1, 2).reshape(src.shape))
        hyper = [mlp(out[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
        logits = torch.stack(hyper, dim=1) @ upscaled.flatten(2)
        logits = logits.unflatten(2, upscaled.shape[-2:])[:, 1:]
        iou = decoder.iou_prediction_head(out[:, 0])[:, 1:]
        return iou.unflatten(0, (batch, prompts)), logits.unflatten(0, (batch, prompts))


def _select(logits: Tensor, iou: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Return the one mask of SamOnnxModel's rule: mask 0 for three points and more, else the best of the others."""
    first = torch.zeros_like(iou)
    first[:, 0] = 1000.0
    best = torch.argmax(iou + (points - 2.5) * first, dim=1)
    return logits.index_select(1, best), iou.index_select(1, best)


def _padded(points_1N2: Tensor, labels_1N: Tensor) -> tuple[Tensor, Tensor]:
    """Add SAM's padding point, unless the prompt has a box, whose labels are 2 and 3, or is padded already."""
    clicks = (labels_1N == labels_1N.clamp(0, 1)).to(torch.int64).min()
    count = labels_1N.shape[1] + clicks
    return F.pad(points_1N2, (0, 0, 0, 1))[:, :count], F.pad(labels_1N, (0, 1), value=-1)[:, :count]


def _shrink(mask: Tensor, low: int) -> Tensor:
    """Return the mask at the low resolution; the exact values if each was repeated as a square."""
    side = int(mask.shape[-1])
    if side == low:
        return mask
    if side % low == 0:
        return F.avg_pool2d(mask, side // low)
    return F.interpolate(mask, (low, low), mode="bilinear", align_corners=False)


def _enlarge(logits: Tensor, side: int | None) -> Tensor:
    """Return logits at another side, smooth: samexporter draws its masks from them."""
    if side is None or side == int(logits.shape[-1]):
        return logits
    return F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
