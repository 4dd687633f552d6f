"""SAM's image encoder with the same arithmetic in a faster order, on segment_anything's own weights.

It saves time in three ways. Tables of relative positions are gathered once, not at every call. Windowed blocks project
the real tokens only: a padded token is zero, so its query, key and value are the projection's bias, which is inserted
for the softmax. Attention stores few scores at a time: on an accelerator by PyTorch's fused attention, with the
relative positions as an additive bias, and on a CPU by blocks of scores that fit into the CPU's cache. In bf16 the
weights are converted once, and the residual stream, norms and sums stay float32, as under autocast.
Source: segment_anything modeling/image_encoder.py.

Legend: B images or windows, H and W tokens down and across, N = H * W, C channels, h heads, d channels of a head,
k keys of one axis, G = B * h.
"""

import copy
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block, get_rel_pos
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK_BYTES = 1 << 22  # of scores at a time on a CPU: the fastest of 1 to 4 MiB, for windows and whole grids alike
ALIGNED = 8  # keys; CUDA's kernels require the rows of the bias to start at multiples of it


class FastEncoder(nn.Module):
    """A faster `encoder` that computes in `dtype`: fp32 shares its parameters, bf16 converts copies of the large ones.

    `fused` chooses PyTorch's fused attention instead of blocks of scores. Later changes of the weights of `encoder` may
    have no effect; build a new FastEncoder after training.
    """

    def __init__(self, encoder: ImageEncoderViT, dtype: torch.dtype = torch.float32, fused: bool = False) -> None:
        super().__init__()
        assert supported(encoder)
        self.patch_embed, self.pos_embed, self.neck = encoder.patch_embed, encoder.pos_embed, encoder.neck
        side = encoder.img_size // encoder.patch_embed.proj.kernel_size[0]
        blocks: Any = encoder.blocks
        self.blocks = nn.ModuleList(FastBlock(block, side, dtype, fused) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the float32 embedding (B, out, H, W) of normalised float32 images (B, 3, S, S)."""
        with torch.autocast(x.device.type, enabled=False):
            x_BHWC = self.patch_embed(x)
            if self.pos_embed is not None:
                x_BHWC = x_BHWC + self.pos_embed
            for block in self.blocks:
                x_BHWC = block(x_BHWC)
            return self.neck(x_BHWC.permute(0, 3, 1, 2))


class FastBlock(nn.Module):
    """One transformer block on float32 tokens (B, H, W, C); `side` is H = W."""

    def __init__(self, block: Block, side: int, dtype: torch.dtype, fused: bool) -> None:
        super().__init__()
        attention: Attention = block.attn
        self.dtype, self.fused, self.window = dtype, fused, block.window_size
        self.heads, self.scale = attention.num_heads, attention.scale
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.qkv, self.proj = _converted(attention.qkv, dtype), _converted(attention.proj, dtype)
        self.mlp = _converted(block.mlp, dtype)
        self.tables: Tensor | None
        self.register_buffer("tables", _tables(attention, self.window or side, dtype), persistent=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        qkv_BHWC = self.qkv(self.norm1(x_BHWC).to(self.dtype))
        attended_BHWC = self._windowed(qkv_BHWC) if self.window else self._attend(qkv_BHWC)
        x_BHWC = x_BHWC + self.proj(attended_BHWC)
        return x_BHWC + self.mlp(self.norm2(x_BHWC).to(self.dtype))

    def _windowed(self, qkv_BHWC: Tensor) -> Tensor:
        b, height, width, channels = qkv_BHWC.shape
        side = self.window
        down, across = -(-height // side), -(-width // side)
        if (down * side, across * side) != (height, width):
            bias = self.qkv.bias if self.qkv.bias is not None else qkv_BHWC.new_zeros(channels)
            padded = bias.expand(b, down * side, across * side, channels).clone(memory_format=torch.contiguous_format)
            padded[:, :height, :width] = qkv_BHWC
            qkv_BHWC = padded
        windows = qkv_BHWC.view(b, down, side, across, side, channels).transpose(2, 3).flatten(0, 2)
        attended = self._attend(windows).view(b, down, across, side, side, -1).transpose(2, 3)
        return attended.reshape(b, down * side, across * side, -1)[:, :height, :width]

    def _attend(self, qkv_BHWC: Tensor) -> Tensor:
        """Attend within each of B grids; (B, H, W, 3 C) -> (B, H, W, C)."""
        b, height, width, _ = qkv_BHWC.shape
        q, k, v = qkv_BHWC.view(b, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, h, N, d)
        down, across = self._relative(q.unflatten(2, (height, width)))
        if self.fused:
            bias = None if down is None or across is None else _bias(down, across, q.shape[:2])
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        else:
            q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
            attended_GNd = _in_blocks(q, k, v, down, across, self.scale)
            attended = attended_GNd.unflatten(0, (b, self.heads))
        return attended.transpose(1, 2).reshape(b, height, width, -1)

    def _relative(self, q_BhHWd: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return the terms of the keys' rows and columns in a query's scores, each (G, H, W, k)."""
        if self.tables is None:
            return None, None
        q_GHWd = q_BhHWd.flatten(0, 1)
        down = torch.einsum("ghwd,hkd->ghwk", q_GHWd, self.tables[0])
        across = torch.einsum("ghwd,wkd->ghwk", q_GHWd, self.tables[1])
        return down.contiguous(), across.contiguous()


def supported(encoder: Any) -> bool:
    """Return whether `encoder` is segment_anything's own, for whose structure this file is written."""
    return type(encoder) is ImageEncoderViT and all(
        type(block) is Block and type(block.attn) is Attention for block in encoder.blocks
    )


def _converted(module: Any, dtype: torch.dtype) -> Any:
    same = all(parameter.dtype == dtype for parameter in module.parameters())
    return module if same else copy.deepcopy(module).to(dtype).requires_grad_(False)


@torch.no_grad()
def _tables(attention: Attention, side: int, dtype: torch.dtype) -> Tensor | None:
    """Return the position embeddings (2, H, k, d) of all distances of rows and of columns; None if there are none."""
    if not attention.use_rel_pos:
        return None
    tables = [get_rel_pos(side, side, table) for table in (attention.rel_pos_h, attention.rel_pos_w)]
    return torch.stack(tables).to(dtype)


def _scores(down_GHWk: Tensor, across_GHWk: Tensor) -> Tensor:
    """Add the terms of rows and columns, each (G, H, W, k): return (G, N, k * k)."""
    return (down_GHWk[..., :, None] + across_GHWk[..., None, :]).flatten(3).flatten(1, 2)


def _bias(down_GHWk: Tensor, across_GHWk: Tensor, leading: torch.Size) -> Tensor:
    """Return the bias (B, h, N, N) in the queries' dtype, which cuDNN's kernel requires.

    If N is not a multiple of `ALIGNED`, its rows are stored further apart than N, as the memory-efficient kernel
    requires.
    """
    scores = _scores(down_GHWk, across_GHWk).unflatten(0, leading)
    keys = scores.shape[-1]
    return F.pad(scores, (0, -keys % ALIGNED))[..., :keys] if keys % ALIGNED else scores


def _in_blocks(
    q_GNd: Tensor, k_GNd: Tensor, v_GNd: Tensor, down: Tensor | None, across: Tensor | None, scale: float
) -> Tensor:
    """Return softmax(scale * q k + down + across) v, by blocks of heads, or of query rows, of `BLOCK_BYTES`."""
    heads, count, _ = q_GNd.shape
    attended_GNd = torch.empty_like(q_GNd)
    width = count if down is None else down.shape[2]
    row_bytes = width * count * q_GNd.element_size()
    rows = min(max(1, BLOCK_BYTES // row_bytes), count // width)
    together = min(max(1, BLOCK_BYTES // (row_bytes * (count // width))), heads)
    for first in range(0, heads, together):
        g = slice(first, first + together)
        keys, values = k_GNd[g].mT, v_GNd[g]
        for row in range(0, count // width, rows):
            n = slice(row * width, (row + rows) * width)
            q = q_GNd[g, n]
            if down is None or across is None:
                scores = torch.bmm(q, keys).mul_(scale)
            else:
                scores = _scores(down[g, row : row + rows], across[g, row : row + rows])
                scores.baddbmm_(q, keys, alpha=scale)
            attended_GNd[g, n] = torch.bmm(scores.softmax(-1), values)
    return attended_GNd
