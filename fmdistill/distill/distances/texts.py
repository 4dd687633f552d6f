"""Compare images with the embeddings of their captions: the parts that these distances share."""

# Legend: B images of a batch, G of the optimizer step, D the embedding's width.

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.distill.distances.mse import require_same_shape
from fmdistill.distill.distances.rkd import require_vectors
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError
from fmdistill.teachers.output import CAPTION

FIRST_SCALE = 1 / 0.07  # CLIP's before training
LARGEST_SCALE = 100.0  # CLIP's limit
SAME = 1e-5  # captions whose cosine is closer to one are equal: their embeddings differ by rounding


class LogitScale(nn.Module):
    """The factor of the cosines in a softmax, the inverse of its temperature: fixed, or learned up to 100 as CLIP's."""

    def __init__(self, scale: float, learned: bool, setting: str) -> None:
        super().__init__()
        check_scale(scale, setting)
        if learned and scale > LARGEST_SCALE:
            raise UserError(f"{setting}={scale}: a learned scale is {LARGEST_SCALE:g} at most; start with less")
        self.fixed = scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale))) if learned else None

    def forward(self) -> Tensor | float:
        """Return the factor."""
        if self.log_scale is None:
            return self.fixed
        with torch.no_grad():  # as CLIP does: at the end of the range the gradient can still lead back
            self.log_scale.clamp_(max=math.log(LARGEST_SCALE))
        return self.log_scale.exp()


def check_scale(scale: float, setting: str) -> None:
    """Raise a UserError that names `setting` unless `scale` is a finite number above 0."""
    if not 0 < scale < math.inf:
        raise UserError(f"{setting}={scale}: expected a number above 0, such as 50: one over the temperature")


def teacher_factor(given: float | None, logit_scale: float | None) -> float:
    """Return the factor of the teacher's cosines: the setting's, or the teacher's own if that is None."""
    factor = logit_scale if given is None else given
    if factor is None:
        raise UserError(
            "distance.teacher_scale: the teacher's own logit scale is not known, since it is not a cached CLIP; set it"
        )
    check_scale(factor, "distance.teacher_scale")
    return factor


def check_captions(shapes: Mapping[str, tuple[int, ...]] | None, distance: str) -> None:
    """Raise a UserError that names the `distance` if the teacher's outputs, if known, hold no caption's embedding."""
    if shapes is not None and not any(name.rpartition(".")[2] == CAPTION for name in shapes):
        raise_without_captions(distance)


def raise_without_captions(distance: str) -> None:
    """Raise the UserError for a cache without the captions that the `distance` needs."""
    raise UserError(
        f"distance.name={distance}: compares images with their captions, but none are cached; cache a CLIP teacher "
        f"with teacher.captions=1, in another cache.root=FOLDER if it has one already"
    )


def unit_images(seen: Seen, distance: str) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's image embeddings (B, D) at unit length. Raises UserError for maps."""
    student_BD, teacher_BD = require_same_shape(seen)
    require_vectors(student_BD.shape[1:], f"distance.name={distance}")
    return F.normalize(student_BD, dim=1), F.normalize(teacher_BD.to(student_BD), dim=1)


def unit_texts(seen: Seen, distance: str) -> tuple[Tensor, Tensor]:
    """Return the embeddings of the captions at unit length, those of the batch (B, D) and of the whole step (G, D)."""
    if not any(name.rpartition(".")[2] == CAPTION for name in seen.outputs):
        raise_without_captions(distance)
    dtype = seen.student().dtype
    own_BD, step_GD = (x.to(dtype) for x in (seen.teacher(CAPTION), seen.whole_teacher(CAPTION)))
    return F.normalize(own_BD, dim=1), F.normalize(step_GD, dim=1)


def same_texts(own_BD: Tensor, step_GD: Tensor) -> Tensor:
    """Return for each caption (B, G) the share that each one of the step has in it: equal ones share it evenly."""
    same_BG = (own_BD @ step_GD.T > 1 - SAME).to(own_BD)
    return same_BG / same_BG.sum(1, keepdim=True)


def both_ways(logits_GG: Tensor, image_target_GG: Tensor, text_target_GG: Tensor) -> Tensor:
    """Return the mean of two cross-entropies (G,): of each image's row, and of its caption's column.

    The targets are distributions over the texts for each image, and over the images for each text.
    """
    images_G = F.cross_entropy(logits_GG, image_target_GG, reduction="none")
    return (images_G + F.cross_entropy(logits_GG.T, text_target_GG, reduction="none")) / 2
