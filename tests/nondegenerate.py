"""Non-degenerate random weights: no parameter or statistic is zero or one, as many are at initialisation."""

import torch
from torch import nn


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every floating-point parameter and saved buffer of `module` and return it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(module.state_dict().items()):
            if not tensor.is_floating_point():
                continue
            drawn = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                drawn = 0.5 + torch.rand(tensor.shape, generator=generator)
            elif "pos_embed" in name or "rel_pos" in name or "attention_biases" in name:
                drawn = 0.5 * drawn
            elif tensor.ndim >= 2 and "embed" not in name and "token" not in name and "gaussian" not in name:
                drawn = drawn / tensor[0].numel() ** 0.5
            elif tensor.ndim < 2 and name.endswith("weight"):
                drawn = 1 + 0.2 * drawn
            elif tensor.ndim < 2:
                drawn = 0.2 * drawn
            tensor.copy_(drawn)
    return module.eval()


def tiny_sam(seed: int = 0, size: int = 64, channels: int = 32):
    """Return a segment_anything Sam of 64 px, 4x4 tokens and 32 channels with non-degenerate weights."""
    from segment_anything.modeling import ImageEncoderViT, Sam

    from fmdistill.backbones.promptable import PromptHead

    encoder = ImageEncoderViT(
        size, 16, 3, 32, 2, 2, 2.0, channels, use_rel_pos=True, window_size=3, global_attn_indexes=(1,)
    )
    head = PromptHead.from_config(
        {
            "embed_dim": channels,
            "image_embedding_size": size // 16,
            "image_size": size,
            "mask_in_chans": 16,
            "transformer_depth": 2,
            "mlp_dim": 16,
            "num_heads": 2,
            "iou_head_hidden_dim": 16,
            "iou_head_depth": 3,
            "num_multimask_outputs": 3,
        }
    )
    return randomize(Sam(encoder, head.prompt_encoder, head.mask_decoder), seed)
