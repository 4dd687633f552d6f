"""Convert state dicts between the parameter names of `TinyViTSAM` and those of MobileSAM."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

HEADS = ("norm_head.weight", "norm_head.bias", "head.weight", "head.bias")  # in MobileSAM's file, but never used


def mobilesam_names(state: Mapping[str, T]) -> dict[str, T]:
    """Return a `TinyViTSAM` state under the names of MobileSAM's `image_encoder` (without its unused heads)."""
    return {_to_mobilesam(name): value for name, value in state.items()}


def timm_names(state: Mapping[str, T]) -> dict[str, T]:
    """Return the state of a MobileSAM `image_encoder` or of Microsoft's TinyViT under `TinyViTSAM`'s names.

    The classifier heads and the stored attention index tables have no counterpart and are omitted.
    """
    shared = {k: v for k, v in state.items() if k not in HEADS and not k.endswith((".attention_bias_idxs", ".ab"))}
    return {_to_timm(name): value for name, value in shared.items()}


def _to_mobilesam(name: str) -> str:
    root, *parts = name.split(".")
    if root == "neck":
        return name
    assert root == "trunk", name
    if parts[0] == "patch_embed":
        parts[1:2] = ["seq", {"conv1": "0", "conv2": "2"}[parts[1]]]
    if parts[0] == "stages":
        # MobileSAM ends a stage with the downsampling, timm starts the next one with it
        parts[:2] = ["layers", str(int(parts[1]) - (parts[2] == "downsample"))]
    return ".".join("c" if part == "conv" else part for part in parts)


def _to_timm(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "neck":
        return name
    if parts[:2] == ["patch_embed", "seq"]:
        parts[1:3] = [{"0": "conv1", "2": "conv2"}.get(parts[2], parts[2])]
    if parts[0] == "layers":
        parts[:2] = ["stages", str(int(parts[1]) + (parts[2] == "downsample"))]
    return ".".join(["trunk", *("conv" if part == "c" else part for part in parts)])
