"""Probabilistic knowledge transfer (PKT)."""

# Legend: B images, D dimensions.

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.distances.rkd import require_vectors
from fmdistill.distill.seen import Seen

SMALLEST = 1e-7


@dataclass(frozen=True)
class PKT:
    """KL divergence of the student's neighbour probabilities in the batch from the teacher's, one value per image.

    The probability that i has the neighbour j is p_ij = k_ij / sum_j k_ij with k_ij = (1 + cos(x_i, x_j)) / 2. Image i
    gets sum_j p^t_ij log((p^t_ij + e) / (p^s_ij + e)) / B, e = 1e-7, so that the mean over the batch is the mean over
    all pairs. (Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
    with the cosine kernel of the authors' code; RepDistiller's scale is 30000.) The batch is that of one process.
    """

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors (B, D), whose D may differ. Raises UserError for maps."""
        student_BD, teacher_BD = seen.pair()
        for output in (student_BD, teacher_BD):
            require_vectors(output.shape[1:], "distance.name=pkt")
        student_BB, teacher_BB = _neighbours(student_BD), _neighbours(teacher_BD)
        ratio_BB = ((teacher_BB + SMALLEST) / (student_BB + SMALLEST)).log()
        return (teacher_BB * ratio_BB).mean(1)


def _neighbours(vector_BD: Tensor) -> Tensor:
    unit_BD = F.normalize(vector_BD, dim=1)
    kernel_BB = (1 + unit_BD @ unit_BD.T) / 2
    return kernel_BB / kernel_BB.sum(1, keepdim=True)
