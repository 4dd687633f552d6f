"""Groups: the entries that are weighed against each other, and the mean of one within each."""

# Legend: B images, N patches an image, R groups of M entries, G entries of a group that `own` is a part of.

import math
from typing import Literal, NoReturn

import torch
from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError

Group = Literal["image", "batch", "global_batch"]


def rows(values: Tensor, group: Group) -> Tensor:
    """Return `values`, (B, N) or (B,), as (R, M) with one group a row; `view_as` turns weights back."""
    return values if group == "image" else values.flatten()[None]


def grouped(distance: Tensor, seen: Seen, group: Group | None) -> tuple[Tensor, Tensor]:
    """Return the distance and what of it is valid, (R, M) both. None = image for maps, batch for vectors."""
    if distance.dim() == 1:
        if group == "image":
            refuse_image(seen.output, "batch")
        return rows(distance, "batch"), torch.ones_like(distance, dtype=torch.bool)[None]
    assert seen.valid is not None
    return rows(distance, group or "image"), rows(seen.valid, group or "image")


def refuse_image(output: str, instead: str) -> NoReturn:
    """Raise the UserError that an image with one vector has nothing to weigh within it."""
    raise UserError(
        f"weighting.group=image: output={output} has one vector per image, so nothing to weigh within an image; "
        f"use {instead}"
    )


def refuse_global_batch(group: Group | None) -> None:
    """Raise a UserError for the group that weights by the student's own outputs cannot have."""
    if group == "global_batch":
        raise UserError(
            "weighting.group=global_batch: these weights depend on the student, whose outputs for the other images of "
            "the optimizer step are not known before the first backward; use image or batch"
        )


def refuse_patches(distance: Tensor, output: str, asking: str) -> None:
    """Raise a UserError that names who is `asking` where the distance is (B, N) and not (B,)."""
    if distance.dim() != 1:
        raise UserError(
            f"{asking}: weighs whole images, and the distance of output={output} has one value per patch; compare an "
            f"output of one vector per image, such as logits"
        )


def below_largest(score: Tensor, valid: Tensor) -> Tensor:
    """Return how far each score (R, M) is from its group's largest valid one, at most 0: safe to divide and to exp."""
    return score - score.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)


def softmax_weights(logits: Tensor, valid: Tensor, own: Tensor | None = None) -> Tensor:
    """Return exp(logits) over its mean in the group, (R, M), zero where not valid; ones where all are equal.

    `own` (R, M) are the logits to weigh where they are a part of groups (R, G), which are then valid throughout.
    """
    if own is not None:
        return (own - logits.logsumexp(1, keepdim=True) + math.log(logits.shape[1])).exp()
    weight_RM = logits.masked_fill(~valid, -torch.inf).softmax(1) * valid.sum(1, keepdim=True)
    return weight_RM.masked_fill(~valid, 0)  # where an image has no valid patch, the softmax has no value


def mean_one(raw: Tensor, valid: Tensor, own: Tensor | None = None) -> Tensor:
    """Return `raw` >= 0 over its mean in the group, (R, M), zero where not valid; ones where all of a group is zero.

    `own` is as for `softmax_weights`.
    """
    mean_R1 = raw.masked_fill(~valid, 0).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
    raw_RM = raw.masked_fill(~valid, 0) if own is None else own
    weight_RM = torch.where(mean_R1 > 0, raw_RM / mean_R1, 1.0)
    return weight_RM.masked_fill(~valid, 0) if own is None else weight_RM


def mean_one_in_batch(raw: Tensor) -> Tensor:
    """Return `raw` (B,) >= 0 over its mean; ones where all of it is zero."""
    return mean_one(raw[None], torch.ones_like(raw[None], dtype=torch.bool))[0]
