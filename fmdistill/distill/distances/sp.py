"""Similarity-preserving distillation (SP)."""

# Legend: B images, D numbers of an image's output.

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.seen import Seen


@dataclass(frozen=True)
class SP:
    """Squared differences of the batch's similarities G = normalize(f f^T) in student and teacher, one per image.

    f is (B, D), a map flattened with all its channels and patches; `padding: exclude` sets the patches that it leaves
    out to zero. Each row of G has length one. Image i gets the sum of its row's squared differences over B, so that the
    mean over the batch is the published loss. (Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV
    2019, Eq. 1 to 4; common scale 3000.) The two outputs may differ in size. The batch is that of one process.
    """

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors (B, D) or maps (B, C, H, W), whose sizes may differ."""
        student_BB, teacher_BB = (_similarity(_flat(output, seen.valid)) for output in seen.pair())
        return (student_BB - teacher_BB).square().sum(1) / len(student_BB)


def _similarity(vector_BD: Tensor) -> Tensor:
    return F.normalize(vector_BD @ vector_BD.T, dim=1)


def _flat(output: Tensor, valid: Tensor | None) -> Tensor:
    if output.dim() > 2 and valid is not None and valid.shape[1] == output[0, 0].numel():
        output = output.flatten(2) * valid[:, None]
    return output.flatten(1)
