"""Mix the label into the teacher's probabilities."""

# Legend: B images, K classes.

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fmdistill.distill.distances.kd import require_logits
from fmdistill.distill.rectifiers.rewrite import replace_teacher_output
from fmdistill.distill.seen import Seen, at_least_float32
from fmdistill.registry import UserError

SETTING = "rectify.name=probability_mix"


@dataclass(frozen=True)
class ProbabilityMix:
    """Mixes the label into the teacher's probabilities: p' = (1 - k) p + k onehot(y).

    k is chosen such that the label leads by `threshold`. If the teacher is wrong, k = (p_max - p_y + threshold) /
    (1 + p_max - p_y), so p'_y - p'_max = threshold; if it is right, p'_y = min(1, p_y + threshold). (The MFT loss of
    NVIDIA's Model Optimizer, without the 1e-7 in its divisors.) It also stands in for KRDistill (arXiv 2409.07694),
    whose way of rectifying wrong predictions is not published.

    p = softmax(z / temperature); the result z' are logits again, with softmax(z' / temperature) = p'. Set `temperature`
    to that of the distance.
    """

    threshold: float = 0.2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"rectify.threshold={self.threshold}: expected a probability, from 0 to 1")
        if not self.temperature > 0:
            raise UserError(f"rectify.temperature={self.temperature}: expected a number above 0")

    def __call__(self, seen: Seen) -> Seen:
        """Return `seen` with the teacher's logits (B, K) corrected. Raises UserError for maps, or without labels."""
        logits_BK = require_logits(at_least_float32(seen.teacher(seen.output)), SETTING)
        label_B = seen.labels(SETTING)
        p_BK = (logits_BK / self.temperature).softmax(1)
        largest_B1, answer_B1 = p_BK.max(1, keepdim=True)
        behind_B1 = largest_B1 - p_BK.gather(1, label_B[:, None])
        wrong_B1 = (behind_B1 + self.threshold) / (1 + behind_B1)
        smallest = torch.finfo(p_BK.dtype).tiny  # avoids 0 / 0 if p_y is 1, and log(0)
        right_B1 = (self.threshold / (1 - largest_B1).clamp_min(smallest)).clamp_max(1)
        k_B1 = torch.where(answer_B1 == label_B[:, None], right_B1, wrong_B1)
        mixed_BK = torch.lerp(p_BK, F.one_hot(label_B, p_BK.shape[1]).to(p_BK), k_B1)
        return replace_teacher_output(seen, self.temperature * mixed_BK.clamp_min(smallest).log())
