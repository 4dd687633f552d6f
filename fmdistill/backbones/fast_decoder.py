"""SAM's mask decoder for many prompts on one image: the same arithmetic, reordered to repeat less of it.

Before its first update the image is the same for every prompt, so its projections are computed once. Afterwards the few
prompt tokens are multiplied by the projections instead of the many image tokens; this is exact because attention
weights sum to one (biases of values and outputs pass through) and softmax ignores a constant (the keys' bias drops
out). Source: segment_anything modeling/transformer.py and modeling/mask_decoder.py, with the same module names.

Legend: B prompts, T prompt tokens, N image tokens (g * g), C channels, H heads, d channels of a head, M masks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.backbones.promptable import PromptHead

Decode = Callable[..., tuple[Tensor, Tensor]]  # (points, labels, boxes, masks, multimask), as PromptHead.decode


@dataclass(frozen=True)
class SharedImage:
    """Tensors that all prompts of an image share: tokens and positions (N, C), layer 0's projections (H, N, d)."""

    image_NC: Tensor
    position_NC: Tensor
    keys_HNd: Tensor
    values_HNd: Tensor
    queries_HNd: Tensor


def image_decoder(head: PromptHead, embedding: Tensor) -> Decode:
    """Return a decoder of prompts for one image embedding (C, g, g), with the arguments and results of `head.decode`.

    It is the fast one if the head is SAM's, else `head.decode` itself. Mask prompts are decoded by `head.decode`, since
    each adds to the image's tokens before the first layer, which are then not shared.
    """
    if isinstance(head, PromptHead) and supported(head.mask_decoder):
        return partial(_decode, head, embedding, share(head, embedding))
    return partial(head.decode, embedding)


def supported(decoder: Any) -> bool:
    """Return whether `decoder` is segment_anything's own, for whose structure this file is written."""
    if type(decoder) is not MaskDecoder or type(decoder.transformer) is not TwoWayTransformer:
        return False
    layers = list(decoder.transformer.layers)
    upscaling = [type(module).__name__ for module in decoder.output_upscaling]
    return (
        all(type(layer) is TwoWayAttentionBlock for layer in layers)
        and [layer.skip_first_layer_pe for layer in layers] == [True] + [False] * (len(layers) - 1)
        and upscaling == ["ConvTranspose2d", "LayerNorm2d", "GELU", "ConvTranspose2d", "GELU"]
    )


def share(head: PromptHead, embedding: Tensor) -> SharedImage:
    """Compute the tensors that all prompts on `embedding` (C, g, g) share."""
    image_NC = embedding.flatten(1).T + head.prompt_encoder.no_mask_embed.weight
    position_NC = head.prompt_encoder.get_dense_pe()[0].flatten(1).T
    transformer: Any = head.mask_decoder.transformer
    layer = transformer.layers[0]
    to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    return SharedImage(
        image_NC,
        position_NC,
        _heads(to_image.k_proj(image_NC + position_NC), to_image),
        _heads(to_image.v_proj(image_NC), to_image),
        _heads(to_token.q_proj(image_NC + position_NC), to_token),
    )


def _decode(
    head: PromptHead,
    embedding: Tensor,
    shared: SharedImage,
    points: Tensor | None,
    labels: Tensor | None,
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
    multimask: bool = True,
) -> tuple[Tensor, Tensor]:
    if masks is not None:
        return head.decode(embedding, points, labels, boxes, masks, multimask)
    decoder: Any = head.mask_decoder
    sparse, _, _ = head.encode_prompts(points, labels, boxes)
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens, image = _transform(decoder.transformer, shared, torch.cat([own.expand(len(sparse), -1, -1), sparse], 1))
    chosen = range(1, decoder.num_mask_tokens) if multimask else range(1)
    hyper_BMC = torch.stack([decoder.output_hypernetworks_mlps[m](tokens[:, 1 + m]) for m in chosen], dim=1)
    predicted = decoder.iou_prediction_head(tokens[:, 0])[:, chosen.start : chosen.stop]
    return _masks(decoder.output_upscaling, image, hyper_BMC), predicted


def _transform(transformer: Any, shared: SharedImage, prompt_BTC: Tensor) -> tuple[Tensor, Tensor]:
    t, y, yp = prompt_BTC, shared.image_NC.expand(len(prompt_BTC), -1, -1), None
    for layer in transformer.layers:
        if yp is None:
            t = layer.norm1(layer.self_attn(t, t, t))  # SAM's first layer has neither positions nor a residual here
            t = layer.norm2(t + _first_to_image(layer.cross_attn_token_to_image, t + prompt_BTC, shared))
        else:
            q = t + prompt_BTC
            t = layer.norm1(t + layer.self_attn(q, q, t))
            t = layer.norm2(t + _to_image(layer.cross_attn_token_to_image, t + prompt_BTC, y, yp))
        t = layer.norm3(t + layer.mlp(t))
        y = layer.norm4(_to_tokens(layer.cross_attn_image_to_token, t + prompt_BTC, t, y, yp, shared))
        yp = y + shared.position_NC
    assert yp is not None
    t = t + _to_image(transformer.final_attn_token_to_image, t + prompt_BTC, y, yp)
    return transformer.norm_final_attn(t), y


def _heads(x: Tensor, attention: Attention) -> Tensor:
    """Split the channels into heads: (..., L, H * d) -> (..., H, L, d)."""
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(-2, -3)


def _weight(projection: nn.Linear, attention: Attention) -> Tensor:
    """Return the weight of an input projection by head, (H, d, C)."""
    return projection.weight.unflatten(0, (attention.num_heads, -1))


def _scaled(x: Tensor, attention: Attention) -> Tensor:
    return _heads(x, attention) * (attention.internal_dim // attention.num_heads) ** -0.5


def _first_to_image(a: Attention, x_BTC: Tensor, shared: SharedImage) -> Tensor:
    scores = torch.einsum("bhtd,hnd->bhtn", _scaled(a.q_proj(x_BTC), a), shared.keys_HNd)
    attended_BTHd = torch.einsum("bhtn,hnd->bthd", scores.softmax(-1), shared.values_HNd)
    return a.out_proj(attended_BTHd.flatten(2))


def _to_image(a: Attention, x_BTC: Tensor, y_BNC: Tensor, yp_BNC: Tensor) -> Tensor:
    q_BHTC = torch.einsum("bhtd,hdc->bhtc", _scaled(a.q_proj(x_BTC), a), _weight(a.k_proj, a))
    weights = torch.bmm(q_BHTC.flatten(1, 2), yp_BNC.mT).softmax(-1)
    average_BHTC = torch.bmm(weights, y_BNC).unflatten(1, (a.num_heads, -1))
    attended_BTHd = torch.einsum("bhtc,hdc->bthd", average_BHTC, _weight(a.v_proj, a))
    return a.out_proj(attended_BTHd.flatten(2) + a.v_proj.bias)


def _to_tokens(
    a: Attention, x_BTC: Tensor, t_BTC: Tensor, y_BNC: Tensor, yp_BNC: Tensor | None, shared: SharedImage
) -> Tensor:
    """Return y plus the attention of the image to the tokens, (B, N, C)."""
    k_BHTd = _scaled(a.k_proj(x_BTC), a)
    if yp_BNC is None:
        scores = torch.einsum("bhtd,hnd->bhtn", k_BHTd, shared.queries_HNd)
    else:
        w_BHTC = torch.einsum("bhtd,hdc->bhtc", k_BHTd, _weight(a.q_proj, a))
        bias = torch.einsum("bhtd,hd->bht", k_BHTd, a.q_proj.bias.unflatten(0, (a.num_heads, -1)))
        scores = torch.baddbmm(bias.flatten(1).unsqueeze(-1), w_BHTC.flatten(1, 2), yp_BNC.mT)
        scores = scores.unflatten(1, (a.num_heads, -1))
    out_HdC = a.out_proj.weight.T.unflatten(0, (a.num_heads, -1))
    z_BHTC = torch.einsum("bhtd,hdc->bhtc", _heads(a.v_proj(t_BTC), a), out_HdC)
    z_BHTC[:, 0] += a.out_proj.bias  # once: the weights of one head sum to one
    # Softmax over T with N last in memory: with T last, an axis of about seven, it is several times slower.
    weights = scores.softmax(2).flatten(1, 2)
    return torch.baddbmm(y_BNC, weights.mT, z_BHTC.flatten(1, 2))


def _masks(upscaling: Any, y_BNC: Tensor, hyper_BMC: Tensor) -> Tensor:
    """Return mask logits (B, M, 4g, 4g); the two transposed convolutions of kernel = stride = 2 are matrix products."""
    first, norm, second = upscaling[0], upscaling[1], upscaling[3]
    y = F.linear(y_BNC, _kernel(first), first.bias.repeat(4)).unflatten(-1, (4, -1))
    y = F.gelu(F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias, norm.eps))
    y = F.gelu(F.linear(y, _kernel(second), second.bias.repeat(4)))
    m = torch.bmm(hyper_BMC, y.reshape(len(y), -1, hyper_BMC.shape[-1]).mT)
    g = round(y_BNC.shape[1] ** 0.5)
    # Rows h, a, c and columns w, b, e of the logits are ordered h, w, a, b, c, e.
    cells = m.reshape(*m.shape[:2], g, g, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return cells.reshape(*m.shape[:2], 4 * g, 4 * g)


def _kernel(convolution: nn.ConvTranspose2d) -> Tensor:
    """Return the kernel (in, out, 2, 2) as a matrix (4 * out, in), the four pixels outermost."""
    return convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
