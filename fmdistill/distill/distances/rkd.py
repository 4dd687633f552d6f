"""Relational knowledge distillation (RKD)."""

# Legend: B images, D dimensions.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


@dataclass(frozen=True)
class RKD:
    """Differences of distances and angles between the batch's images: `distance` RKD-D + `angle` RKD-A, one per image.

    RKD-D is smooth-L1 between the Euclidean distances of student and teacher, each divided by the mean of its positive
    ones; image i gets the mean over its row. RKD-A is smooth-L1 between cos(x_j - x_i, x_k - x_i), zero if two of the
    three coincide; image i gets the mean over all j, k at the vertex i. The mean over the batch is thus the published
    loss. (Park et al., "Relational Knowledge Distillation", CVPR 2019.) The defaults are those of mdistiller and
    RepDistiller for CIFAR-100; the paper uses 1 and 2 for metric learning. The batch is that of one process; memory
    grows with the cube of its size.
    """

    distance: float = 25.0
    angle: float = 50.0

    def __post_init__(self) -> None:
        if not (self.distance >= 0 and self.angle >= 0 and self.distance + self.angle > 0):
            raise UserError(
                f"distance.distance={self.distance}, distance.angle={self.angle}: expected weights of at least 0, "
                f"one of them above"
            )

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors (B, D), whose D may differ. Raises UserError for maps."""
        student_BD, teacher_BD = seen.pair()
        for output in (student_BD, teacher_BD):
            require_vectors(output.shape[1:], "distance.name=rkd")
        value_B = student_BD.new_zeros(len(student_BD))
        for weight, relations in ((self.distance, relative_distances), (self.angle, angle_cosines)):
            if weight:
                with torch.no_grad():
                    teacher = relations(teacher_BD)
                gap = F.smooth_l1_loss(relations(student_BD), teacher, reduction="none")
                value_B = value_B + weight * gap.flatten(1).mean(1)
        return value_B


def relative_distances(vector_BD: Tensor) -> Tensor:
    """Return the Euclidean distances (B, B) between all images, divided by the mean of the positive ones."""
    distance_BB = torch.cdist(vector_BD, vector_BD, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distance_BB.sum() / (distance_BB > 0).sum().clamp_min(1)
    return distance_BB / mean.clamp_min(1e-12)


def angle_cosines(vector_BD: Tensor) -> Tensor:
    """Return cos(x_j - x_i, x_k - x_i) at [i, j, k], (B, B, B); zero if x_j or x_k equals x_i."""
    difference_BBD = vector_BD[None] - vector_BD[:, None]
    norm_BB1 = difference_BBD.norm(dim=2, keepdim=True)
    unit_BBD = difference_BBD * ((norm_BB1 > 0) / norm_BB1.clamp_min(1e-12))
    return torch.bmm(unit_BBD, unit_BBD.transpose(1, 2))


def require_vectors(shape: Sequence[int], setting: str) -> None:
    """Raise a UserError that names `setting` unless `shape`, that of one image's output, is a vector's (D,)."""
    if len(shape) != 1:
        raise UserError(
            f"{setting}: compares images with each other by one vector per image, but an image's output is a map "
            f"{tuple(shape)}; choose the pooled output, such as feature, or compare maps by mse, cosine, fitnet or at"
        )
