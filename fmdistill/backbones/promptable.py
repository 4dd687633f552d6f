"""SAM's promptable head: maps an image embedding and prompts to mask logits and predicted IoU."""

# Legend: B images, P prompts, K points per prompt, C channels, g tokens per side, M masks, n = 4 g the low resolution.

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.files import write_whole
from fmdistill.registry import UserError

CONFIG_KEYS = (
    "embed_dim",
    "image_embedding_size",
    "image_size",
    "mask_in_chans",
    "transformer_depth",
    "mlp_dim",
    "num_heads",
    "iou_head_hidden_dim",
    "iou_head_depth",
    "num_multimask_outputs",
)


class PromptHead(nn.Module):
    """SAM without its image encoder: segment_anything's PromptEncoder and MaskDecoder, unchanged."""

    def __init__(self, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder):
        super().__init__()
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.config = _config(prompt_encoder, mask_decoder)

    @classmethod
    def from_config(cls, config: Mapping[str, int]) -> "PromptHead":
        """Return a head with initial weights. Raises UserError unless `config` has exactly CONFIG_KEYS."""
        if set(config) != set(CONFIG_KEYS):
            raise UserError(f"prompt head config: expected the keys {list(CONFIG_KEYS)}, got {sorted(config)}")
        c, g, size = config["embed_dim"], config["image_embedding_size"], config["image_size"]
        transformer = TwoWayTransformer(
            depth=config["transformer_depth"], embedding_dim=c, num_heads=config["num_heads"], mlp_dim=config["mlp_dim"]
        )
        decoder = MaskDecoder(
            transformer_dim=c,
            transformer=transformer,
            num_multimask_outputs=config["num_multimask_outputs"],
            iou_head_depth=config["iou_head_depth"],
            iou_head_hidden_dim=config["iou_head_hidden_dim"],
        )
        return cls(PromptEncoder(c, (g, g), (size, size), config["mask_in_chans"]), decoder)

    @classmethod
    def from_sam(cls, sam: Sam) -> "PromptHead":
        """Return the head of `sam`, with which it shares parameters."""
        return cls(sam.prompt_encoder, sam.mask_decoder)

    def save(self, folder: str | Path) -> None:
        """Write head.safetensors, then head.json, each whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_whole(folder / "head.safetensors", to_bytes(state))
        write_whole(folder / "head.json", json.dumps(self.config, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "PromptHead":
        """Return the head that `save` wrote, in eval mode. Raises UserError if it is missing or damaged."""
        folder = Path(folder)
        try:
            head = cls.from_config(json.loads((folder / "head.json").read_text()))
            head.load_state_dict(load_file(folder / "head.safetensors"))
        except (OSError, ValueError, TypeError, AssertionError, SafetensorError, RuntimeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"{folder}: no readable prompt head (head.json, head.safetensors): {reason}") from error
        return head.eval()

    def decode(
        self,
        embedding: Tensor,
        points: Tensor | None,
        labels: Tensor | None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        multimask: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return logits (P, M, n, n) and predicted IoU (P, M) of prompts on ONE image embedding (C, g, g).

        `points` (P, K, 2) are xy in resized-image pixels, `labels` (P, K) 1 foreground, 0 background, -1 padding,
        `boxes` (P, 4) xyxy, `masks` (P, 1, n, n) logits of an earlier answer. M is 3 (masks 1 to 3) if `multimask`,
        else 1 (mask 0).
        """
        logits_PMnn, iou_PM = self.decode_all(embedding, points, labels, boxes, masks)
        chosen = slice(1, None) if multimask else slice(0, 1)
        return logits_PMnn[:, chosen], iou_PM[:, chosen]

    def decode_all(
        self,
        embedding: Tensor,
        points: Tensor | None,
        labels: Tensor | None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return logits (P, 4, n, n) and predicted IoU (P, 4) of every mask; arguments as in `decode`."""
        sparse, dense, pe = self.encode_prompts(points, labels, boxes, masks)
        return self.mask_decoder.predict_masks(embedding[None], pe, sparse, dense)

    def encode_prompts(
        self, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None = None, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return sparse (P, T, C), dense (P, C, g, g) and positional (1, C, g, g) embeddings; `masks` (P, 1, n, n)."""
        point_pair = None if points is None else (points.float(), labels)
        # Coordinates in bfloat16 would be wrong by whole pixels.
        with torch.autocast(self.prompt_encoder.no_mask_embed.weight.device.type, enabled=False):
            sparse, dense = self.prompt_encoder(points=point_pair, boxes=boxes, masks=masks)
            return sparse, dense, self.prompt_encoder.get_dense_pe()

    def encode_mixed(
        self, points: Tensor, labels: Tensor, boxes: Tensor, boxed: Tensor, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return sparse (P, T, C) and dense (P, C, g, g) embeddings; if `boxed` (P,), of the box, not the first point.

        Arguments are as in `decode`. A point comes with SAM's padding token and a box has two corners, so both are as
        many tokens and share a decoder call; this holds too with corrective points after the first one, which belong to
        either.
        """
        as_point, dense, _ = self.encode_prompts(points, labels, masks=masks)
        later = (points[:, 1:], labels[:, 1:]) if points.shape[1] > 1 else (None, None)
        as_box, _, _ = self.encode_prompts(*later, boxes=boxes)
        return torch.where(boxed[:, None, None], as_box, as_point), dense

    def decode_batch(self, embedding: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B*P, 4, n, n) and predicted IoU (B*P, 4) of P prompts for each of B embeddings (B, C, g, g).

        `sparse` (B*P, T, C) and `dense` (B*P, C, g, g) come from `encode_prompts`, image by image.
        """
        logits, iou, _ = self.decode_tokens(embedding, sparse, dense)
        return logits, iou

    def decode_tokens(self, embedding: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `decode_batch` does, and the mask tokens (B*P, 4, C) from which the masks are made.

        MaskDecoder itself takes one image per call; this is its `predict_masks` with every image repeated for its own
        prompts.
        """
        decoder, per_image = self.mask_decoder, len(sparse) // len(embedding)
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens_PTC = torch.cat([own.expand(len(sparse), -1, -1), sparse], dim=1)
        src = embedding.repeat_interleave(per_image, dim=0) + dense
        with torch.autocast(src.device.type, enabled=False):
            pe = self.prompt_encoder.get_dense_pe()
        out_PTC, src_PNC = decoder.transformer(src, pe.expand_as(src), tokens_PTC)
        upscaled = decoder.output_upscaling(src_PNC.transpose(1, 2).reshape(src.shape))
        masks_PMC = out_PTC[:, 1 : len(own)]
        hyper = [mlp(masks_PMC[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
        logits = (torch.stack(hyper, dim=1) @ upscaled.flatten(2)).view(len(sparse), -1, *upscaled.shape[-2:])
        return logits, decoder.iou_prediction_head(out_PTC[:, 0]), masks_PMC

    def upsample(self, logits: Tensor, resized: tuple[int, int], original: tuple[int, int]) -> Tensor:
        """Return logits (P, M, n, n) at the original (H, W): bilinear to S, padding cropped, bilinear to (H, W)."""
        size = self.config["image_size"]
        at_input = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)
        cropped = at_input[..., : int(resized[0]), : int(resized[1])]
        return F.interpolate(cropped, (int(original[0]), int(original[1])), mode="bilinear", align_corners=False)

    def downsample(self, masks: Tensor, resized: tuple[int, int]) -> Tensor:
        """Return bool masks (P, H, W) on the logits' grid, (P, 1, n, n): the share of each cell they cover, less half.

        What `upsample` makes of it is what this resolution preserves of a mask.
        """
        size, side = self.config["image_size"], 4 * self.config["image_embedding_size"]
        shares = F.interpolate(masks[:, None].float(), resized, mode="bilinear", align_corners=False, antialias=True)
        padded = F.pad(shares, (0, size - resized[1], 0, size - resized[0]), mode="replicate")
        return F.avg_pool2d(padded, size // side) - 0.5


def _config(prompt_encoder: PromptEncoder, decoder: MaskDecoder) -> dict[str, Any]:
    transformer = decoder.transformer
    return {
        "embed_dim": prompt_encoder.embed_dim,
        "image_embedding_size": prompt_encoder.image_embedding_size[0],
        "image_size": prompt_encoder.input_image_size[0],
        "mask_in_chans": prompt_encoder.mask_downscaling[3].out_channels,
        "transformer_depth": transformer.depth,
        "mlp_dim": transformer.mlp_dim,
        "num_heads": transformer.num_heads,
        "iou_head_hidden_dim": decoder.iou_prediction_head.layers[0].out_features,
        "iou_head_depth": decoder.iou_prediction_head.num_layers,
        "num_multimask_outputs": decoder.num_multimask_outputs,
    }
