"""Similarity of each entry to its group in the teacher's embedding."""

# Legend: B images, N patches per image, C or D channels, G images of the optimizer step, R groups of M entries.

import torch
from torch import Tensor
from torch.nn import functional as F

from fmdistill.cache.similarity import average_similarity, kept_similarity
from fmdistill.distill.seen import Seen, teacher_name
from fmdistill.distill.weightings.groups import Group, raise_single_vector, rows
from fmdistill.registry import UserError

ROUNDING = 1e-5  # mean cosines of one group that differ by less are taken as equal


@torch.no_grad()
def similarities(
    distance: Tensor, seen: Seen, feature: str | None, group: Group | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return each entry's mean cosine to its group (R, M), the mask of valid entries (R, M), and None.

    For vectors the third value is instead the similarities (1, B) of the distance's own entries, since the group may
    contain other images. `feature` None means the output that the term compares; `group` None means the image for maps
    and the global batch for vectors. For maps, use the similarities stored in the cache if it has them.
    """
    name, patches = feature or seen.output, distance.dim() == 2
    vectors, group = seen.teacher(name), group or ("image" if patches else "global_batch")
    check_feature(group, name, seen, distance, vectors)
    if not patches:
        return sample_similarity(vectors, seen.whole_teacher(name) if group == "global_batch" else vectors)
    assert seen.valid is not None
    stored = seen.similarity.get(teacher_name(name, seen.outputs))
    if group == "image" and stored is not None:
        return kept_similarity(stored, seen.valid), seen.valid, None
    feature_RCM, valid_RM = vectors.flatten(2), rows(seen.valid, group)
    if group == "batch":
        feature_RCM = feature_RCM.transpose(0, 1).flatten(1)[None]
    return average_similarity(feature_RCM, valid_RM), valid_RM, None


def sample_similarity(feature: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, as `similarities` does, the mean cosines to the group `whole` (G, D) of its own entries and `feature`'s.

    Shapes: (1, G), a mask (1, G) that is all true, and (1, B).
    """
    mean_D = F.normalize(whole.float(), dim=1).mean(0)
    own_1B, whole_1G = ((F.normalize(f.float(), dim=1) @ mean_D)[None] for f in (feature, whole))
    return whole_1G, torch.ones_like(whole_1G, dtype=torch.bool), own_1B


def spread(similarity: Tensor, valid: Tensor) -> Tensor:
    """Return the standard deviation (R, 1) of each group's valid similarities (R, M), at least `ROUNDING`."""
    count_R1 = valid.sum(1, keepdim=True).clamp_min(1)
    mean_R1 = (similarity * valid).sum(1, keepdim=True) / count_R1
    return (((similarity - mean_R1).square() * valid).sum(1, keepdim=True) / count_R1).sqrt().clamp_min(ROUNDING)


def check_feature(group: Group, feature: str, seen: Seen, distance: Tensor, vectors: Tensor) -> None:
    """Raise a UserError if the entries of a distance cannot be weighed by the teacher's output `feature`, `vectors`."""
    kinds, patches, map_feature = (
        ("one vector per image", "one vector per patch"),
        distance.dim() == 2,
        vectors.dim() == 4,
    )
    if patches != map_feature:
        raise UserError(
            f"weighting.feature={feature}: has {kinds[map_feature]}, but output={seen.output} has {kinds[patches]}; "
            f"weigh by a feature of the output's kind"
        )
    if patches and vectors.flatten(2).shape[2] != distance.shape[1]:
        raise UserError(
            f"weighting.feature={feature}: has {vectors.flatten(2).shape[2]} patches, but the distance of "
            f"output={seen.output} has {distance.shape[1]}; weigh by a feature with as many patches"
        )
    if patches and group == "global_batch":
        raise UserError(
            f"weighting.group=global_batch: output={seen.output} has {kinds[1]}, and patches are not exchanged "
            f"between processes; use image or batch"
        )
    if not patches and group == "image":
        raise_single_vector(seen.output, "global_batch or batch")
    if group == "global_batch" and teacher_name(feature, seen.outputs) not in seen.whole:
        raise UserError(
            f"weighting.group=global_batch: {feature} is rectified for the images of this batch only, not for the "
            f"others of the optimizer step; use batch, or weigh by another feature"
        )
