"""Divide the patches of an image into regions whose patches have similar teacher's vectors."""

# Legend: B images, C channels, N patches per image, R regions of an image.

import torch
from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.similarity import ROUNDING, check_feature
from fmdistill.registry import UserError


@torch.no_grad()
def teacher_regions(distance: Tensor, seen: Seen, feature: str | None, count: int) -> tuple[Tensor, Tensor]:
    """Return the teacher's unit vectors (B, C, N), zero for invalid patches, and the regions, bool (B, R, N).

    `feature` None means the output that the term compares. Each valid patch is in exactly one region, others in none.
    Raises UserError if the distance (B,) is of vectors, or if the feature has other patches than the distance.
    """
    name = feature or seen.output
    if distance.dim() == 1:
        raise no_regions(seen.output, "weighting")
    vectors = seen.teacher(name)
    check_feature("image", name, seen, distance, vectors)
    assert seen.valid is not None
    unit_BCN = F.normalize(vectors.flatten(2).float(), dim=1).masked_fill(~seen.valid[:, None], 0)
    return unit_BCN, divide(unit_BCN, seen.valid, count)


def divide(unit: Tensor, valid: Tensor, count: int) -> Tensor:
    """Return the region of each valid patch as bool (B, R, N): that of the anchor with the largest cosine to it.

    `unit` are unit vectors (B, C, N), zero for invalid patches. The first anchor is the patch most similar to the
    image's mean; each further one is the patch whose largest cosine to the anchors before is smallest (farthest-point
    sampling, without chance). A patch that equals an anchor is no anchor, so an image of fewer than R different patches
    has fewer regions, and the others are empty. Equal cosines go to the first patch and to the first anchor.
    """
    mean_BC1 = unit.sum(2, keepdim=True)  # not divided: the largest cosine is the same
    chosen_B1 = _cosines(mean_BC1, unit).masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
    nearest_BN = torch.full_like(unit[:, 0], -torch.inf)
    cosines = []
    for _ in range(count):
        anchor_BC1 = unit.gather(2, chosen_B1[:, None].expand(-1, unit.shape[1], -1))
        repeated_B1 = nearest_BN.gather(1, chosen_B1) >= 1 - ROUNDING
        cosines.append(_cosines(anchor_BC1, unit).masked_fill(repeated_B1, -torch.inf))
        nearest_BN = nearest_BN.maximum(cosines[-1]).scatter(1, chosen_B1, 1)  # a patch of zeros has cosine 0 to itself
        chosen_B1 = nearest_BN.masked_fill(~valid, torch.inf).argmin(1, keepdim=True)
    region_B1N = torch.stack(cosines, 1).argmax(1, keepdim=True)
    return (region_B1N == torch.arange(count, device=unit.device)[:, None]) & valid[:, None]


def _cosines(vector_BC1: Tensor, unit_BCN: Tensor) -> Tensor:
    return torch.bmm(vector_BC1.transpose(1, 2), unit_BCN).squeeze(1)


def check_regions(count: int) -> None:
    """Raise a UserError for fewer than two regions."""
    if count < 2:
        raise UserError(
            f"weighting.regions={count}: expected at least 2 regions; one region is the whole image, which srw and "
            f"uniform weigh"
        )


def no_regions(output: str, setting: str) -> UserError:
    """Return the UserError that names `setting`, a weighting by regions, for an `output` without patches."""
    return UserError(
        f"{setting}: output={output} is compared by one value per image, which has no regions; use a weighting of "
        f"whole images, such as srw, or compare the patches of a map"
    )
