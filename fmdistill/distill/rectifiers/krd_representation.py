"""KRDistill-style features: remove the effect of class frequencies from the teacher's features."""

# Legend: B images, D channels, K classes.

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.distill.rectifiers.priors import Priors
from fmdistill.distill.rectifiers.rewrite import replace_teacher_output
from fmdistill.distill.seen import Seen, at_least_float32
from fmdistill.registry import UserError

SETTING = "rectify.name=krd_representation"


class KRDRepresentation(nn.Module):
    """Moves the teacher's features to where balanced classes would place them: an experimental reconstruction.

    Only the abstract of "Learn from Balance" (KRDistill, arXiv 2409.07694) is known to us: the features of a teacher
    trained on long-tailed data are biased to frequent classes, and are rectified "through the incorporation of the
    balanced category priors". Its equations and weights are unknown, so this is KRDistill-style and claims no parity:

    - "etf": unit((1 - g) unit(t) + g m_y), m_y the label's anchor of a simplex equiangular tight frame (unit vectors,
      cosine -1 / (K - 1) between any two), drawn from a fixed seed, and g = gamma (1 - n_y / n_max)^power for a class
      of n_y images; gamma and power are guesses. Since targets have length one, compare them by mse with normalize
      true; the sum over the channels, |s - r|^2, is D times that.
    - "means": t - sum_c pi_c mu_c + mean_c mu_c, mu_c the mean feature and pi_c the share of class c: the mean over
      all images becomes the mean over balanced classes. It needs no labels, and uses no class means of a batch.

    The student's feature needs the teacher's dimensions, or a distance that projects it to them, such as fitnet.
    """

    anchors_KD: Tensor
    pull_K: Tensor
    shift_D: Tensor | None

    def __init__(
        self,
        priors: Priors,
        teacher: tuple[int, ...],
        anchors: Literal["etf", "means"] = "etf",
        gamma: float = 0.5,
        power: float = 1.0,
    ) -> None:
        super().__init__()
        if len(teacher) != 1:
            raise UserError(
                f"{SETTING}: the teacher's output is a map {teacher}; rectify an output of one vector per image"
            )
        if not (0 <= gamma <= 1 and power >= 0):
            raise UserError(
                f"rectify.gamma={gamma}, rectify.power={power}: expected a gamma from 0 to 1 and a power of at least 0"
            )
        self.priors, self.anchors, self.shares_K = priors, anchors, priors.shares()
        self.register_buffer("shift_D", None, persistent=False)
        if anchors == "etf":
            self.register_buffer("anchors_KD", simplex(len(self.shares_K), teacher[0]))
            self.register_buffer("pull_K", (gamma * (1 - self.shares_K / self.shares_K.max()) ** power).float())

    def forward(self, seen: Seen) -> Seen:
        """Return `seen` with the teacher's features (B, D) rectified. Raises UserError if "etf" lacks a label."""
        feature_BD = at_least_float32(seen.teacher(seen.output))
        if self.anchors == "means":
            return replace_teacher_output(seen, feature_BD + self._shift(seen.output, feature_BD))
        label_B = seen.labels(SETTING)
        pull_B1 = self.pull_K[label_B][:, None]
        return replace_teacher_output(
            seen,
            F.normalize((1 - pull_B1) * F.normalize(feature_BD, dim=1) + pull_B1 * self.anchors_KD[label_B], dim=1),
        )

    def _shift(self, output: str, like: Tensor) -> Tensor:
        """Return mean_c mu_c - sum_c pi_c mu_c, (D,); the first call computes the means over the training images."""
        if self.shift_D is None:
            means_KD = self.priors.means(output).double().cpu()
            self.shift_D = (means_KD.mean(0) - self.shares_K.cpu() @ means_KD).to(like)
        return self.shift_D


def simplex(classes: int, dimensions: int) -> Tensor:
    """Return `classes` unit vectors (K, D) as far apart as possible: a simplex equiangular tight frame.

    M = sqrt(K / (K - 1)) U (I - J / K), J all ones and the columns of U (D, K) orthonormal, drawn from a fixed seed.
    Raises UserError if K > D.
    """
    if not 2 <= classes <= dimensions:
        raise UserError(
            f"rectify.anchors=etf: {dimensions} dimensions hold the anchors of 2 to {dimensions} classes, not of "
            f"{classes}; use rectify.anchors=means, or a wider output"
        )
    drawn_DK = torch.randn(dimensions, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    orthonormal_DK = torch.linalg.qr(drawn_DK).Q
    centred_KK = torch.eye(classes, dtype=torch.float64) - 1 / classes
    return ((classes / (classes - 1)) ** 0.5 * orthonormal_DK @ centred_KK).T.float().contiguous()
