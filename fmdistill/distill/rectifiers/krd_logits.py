"""KRDistill-style logits: remove the effect of class frequencies from the teacher's logits."""

# Legend: B images, K classes.

import torch
from torch import Tensor, nn

from fmdistill.distill.distances.kd import require_logits
from fmdistill.distill.rectifiers.priors import Priors
from fmdistill.distill.rectifiers.rewrite import replace_teacher_output
from fmdistill.distill.seen import Seen, at_least_float32
from fmdistill.registry import UserError


class KRDLogits(nn.Module):
    """Replaces logits z by z - kappa log pi, with pi the class's share of the training images: experimental.

    Only the abstract of "Learn from Balance" (KRDistill, arXiv 2409.07694) is known to us: a teacher trained on
    long-tailed data predicts frequent classes too often, and its logits are rectified by the class priors. Its
    equations and weights are unknown, so this is KRDistill-style and claims no parity; kappa 1 is a guess. It needs no
    labels.

    With `beta` (0.9999 in the code of Balanced Knowledge Distillation) the logits are z + kappa log w instead, with w
    the inverse effective number (1 - beta) / (1 - beta^n) of a class of n images, scaled to sum to K. If kappa is the
    distance's temperature T (2 in that code), w multiplies the probabilities softmax(z / T).
    """

    offset: Tensor

    def __init__(self, priors: Priors, kappa: float = 1.0, beta: float | None = None) -> None:
        super().__init__()
        if not kappa > 0:
            raise UserError(f"rectify.kappa={kappa}: expected a number above 0; remove the rectifier for no correction")
        if beta is not None and not 0 < beta < 1:
            raise UserError(f"rectify.beta={beta}: expected a number between 0 and 1, or null for the classes' shares")
        shares_K = priors.shares()
        log_K = shares_K.log() if beta is None else -inverse_effective_number(priors.counts, beta).log()
        self.register_buffer("offset", (-kappa * log_K).float())

    def forward(self, seen: Seen) -> Seen:
        """Return `seen` with the teacher's logits (B, K) rectified.

        Raises UserError for maps, or if K is not the number of classes of the training images.
        """
        logits_BK = require_logits(at_least_float32(seen.teacher(seen.output)), "rectify.name=krd_logits")
        if logits_BK.shape[1:] != self.offset.shape:
            raise UserError(
                f"rectify.name=krd_logits: output={seen.output} has {logits_BK.shape[1]} values and the images "
                f"{len(self.offset)} classes; compare the logits of a teacher of these classes"
            )
        return replace_teacher_output(seen, logits_BK + self.offset)


def inverse_effective_number(counts: Tensor, beta: float) -> Tensor:
    """Return (1 - beta) / (1 - beta^n) for the counts n (K,), scaled to sum to K, in float64."""
    inverse_K = (1 - beta) / -torch.expm1(counts.double() * torch.tensor(beta, dtype=torch.float64).log())
    return inverse_K * len(counts) / inverse_K.sum()
