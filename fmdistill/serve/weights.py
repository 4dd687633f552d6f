"""Compute SRW's weight of every patch of an image from the teacher's embedding."""

# Legend: C channels, g patches a side, N patches.

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fmdistill.distill.refine import WHOLE_MASKS
from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.srw import SRW
from fmdistill.recipe import Recipe
from fmdistill.serve.pictures import OpenImage
from fmdistill.serve.subjects import OpenedRuns

DEFAULT = SRW(temperature=0.5)  # as `fmdistill inspect`


def weighting(recipes: Mapping[str, Recipe]) -> tuple[SRW, str]:
    """Return the SRW of the first run that weighed patches with it, or DEFAULT, and its description."""
    names = [field.name for field in fields(SRW) if field.name not in ("feature", "group")]
    for name, recipe in recipes.items():
        for term in recipe.objective.values():
            stated = term.get("weighting") or {}
            if stated.get("name") == "srw" and term.get("output") not in WHOLE_MASKS:
                srw = SRW(**{key: stated[key] for key in names if key in stated})
                return srw, f"{_settings(srw)}, as {name} was trained"
    return DEFAULT, _settings(DEFAULT)


def _settings(srw: SRW) -> str:
    extra = "".join(f", {name}" for name in ("relative", "reverse") if getattr(srw, name))
    return f"temperature {srw.temperature:g}{extra}"


@torch.inference_mode()
def weight_map(opened: OpenedRuns, image: OpenImage, embedding: Tensor) -> dict[str, Any]:
    """Return SRW's weights of the image's patches as JSON: rows of numbers, their mean 1, without the padding.

    "patch" is a patch's side as shares of the picture's width and height.
    """
    srw, description = weighting(opened.recipes)
    valid_1gg = opened.preprocess.valid(image.sizes)
    seen = Seen({"embedding": embedding[None].cpu()}, valid_1gg.flatten(1), "embedding")
    weight_gg = srw(torch.zeros(1, valid_1gg[0].numel()), seen).view_as(valid_1gg[0])
    rows, columns = int(valid_1gg[0].any(1).sum()), int(valid_1gg[0].any(0).sum())
    inside = weight_gg[:rows, :columns]
    h, w = image.sizes[0].tolist()
    return {
        "weights": [[round(value, 4) for value in row] for row in inside.tolist()],
        "patch": [opened.preprocess.stride / w, opened.preprocess.stride / h],
        "low": float(inside.min()),
        "high": float(inside.max()),
        "about": description,
    }
