"""Groups: the entries that are weighed against each other, with a mean weight of one within each group."""

# Legend: B images, N patches per image, R groups of M entries, G entries of a group that contains `own`.

import math
from typing import Literal, NoReturn

import torch
from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError

Group = Literal["image", "batch", "global_batch"]


def rows(values: Tensor, group: Group) -> Tensor:
    """Return `values`, (B, N) or (B,), as (R, M) with one group per row; `view_as` restores the shape."""
    return values if group == "image" else values.flatten()[None]


def grouped(distance: Tensor, seen: Seen, group: Group | None) -> tuple[Tensor, Tensor]:
    """Return the distance and the mask of its valid entries, both (R, M).

    `group` None means "image" for maps and "batch" for vectors. Raises UserError for "image" with vectors.
    """
    if distance.dim() == 1:
        if group == "image":
            raise_single_vector(seen.output, "batch")
        return rows(distance, "batch"), torch.ones_like(distance, dtype=torch.bool)[None]
    assert seen.valid is not None
    return rows(distance, group or "image"), rows(seen.valid, group or "image")


def raise_single_vector(output: str, instead: str) -> NoReturn:
    """Raise the UserError for group "image" if an image has one vector only; it recommends the group `instead`."""
    raise UserError(
        f"weighting.group=image: output={output} has one vector per image, so there is nothing to weigh within an "
        f"image; use {instead}"
    )


def check_group(group: Group | None) -> None:
    """Raise a UserError for "global_batch", which weights that depend on the student's outputs cannot use."""
    if group == "global_batch":
        raise UserError(
            "weighting.group=global_batch: these weights depend on the student, whose outputs for the other images of "
            "the optimizer step are not known before the first backward; use image or batch"
        )


def require_whole_images(distance: Tensor, output: str, setting: str) -> None:
    """Raise a UserError that names `setting` if the distance is (B, N), not (B,)."""
    if distance.dim() != 1:
        raise UserError(
            f"{setting}: weighs whole images, but the distance of output={output} has one value per patch; compare an "
            f"output of one vector per image, such as logits"
        )


def minus_largest(score: Tensor, valid: Tensor) -> Tensor:
    """Subtract from each score (R, M) its group's largest valid score, so that exp cannot overflow."""
    return score - score.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)


def softmax_weights(logits: Tensor, valid: Tensor, own: Tensor | None = None) -> Tensor:
    """Return exp(logits) divided by its mean over the group's valid entries, (R, M); zero for invalid entries.

    If `own` (R, M) is given, weights are returned for these logits, which are some of the groups' logits (R, G); all of
    them must be valid.
    """
    if own is not None:
        return (own - logits.logsumexp(1, keepdim=True) + math.log(logits.shape[1])).exp()
    weight_RM = logits.masked_fill(~valid, -torch.inf).softmax(1) * valid.sum(1, keepdim=True)
    return weight_RM.masked_fill(~valid, 0)  # the softmax of a group without a valid entry is not a number


def mean_one(raw: Tensor, valid: Tensor, own: Tensor | None = None) -> Tensor:
    """Return `raw` >= 0 divided by its mean over the group's valid entries, (R, M); zero for invalid entries.

    If all of a group is zero, its weights are one. `own` is as for `softmax_weights`.
    """
    mean_R1 = raw.masked_fill(~valid, 0).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
    raw_RM = raw.masked_fill(~valid, 0) if own is None else own
    weight_RM = torch.where(mean_R1 > 0, raw_RM / mean_R1, 1.0)
    return weight_RM.masked_fill(~valid, 0) if own is None else weight_RM


def mean_one_in_batch(raw: Tensor) -> Tensor:
    """Return `raw` (B,) >= 0 divided by its mean; ones if all of it is zero."""
    return mean_one(raw[None], torch.ones_like(raw[None], dtype=torch.bool))[0]
