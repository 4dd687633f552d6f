"""Mix the label into the teacher's probabilities."""

# Legend: B images, K classes.

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fmdistill.distill.distances.kd import only_logits
from fmdistill.distill.rectifiers.rewrite import rewrite
from fmdistill.distill.seen import Seen, exact
from fmdistill.registry import UserError

ASKING = "rectify.name=probability_mix"


@dataclass(frozen=True)
class ProbabilityMix:
    """p' = (1 - k) p + k onehot(y), with k as large as makes the label the likeliest class by `threshold`.

    Where the teacher is wrong, k = (p_max - p_y + threshold) / (1 + p_max - p_y), so p'_y - p'_max = threshold; where
    it is right, p'_y = min(1, p_y + threshold). (The MFT loss of NVIDIA's Model Optimizer, without the 1e-7 in its
    divisors.) Here also for the wrong predictions that KRDistill (arXiv 2409.07694) rectifies in a way we do not know.

    p = softmax(z / temperature), and what is left are logits: softmax(z' / temperature) = p'. So `temperature` is that
    of the distance.
    """

    threshold: float = 0.2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"rectify.threshold={self.threshold}: expected a probability, from 0 to 1")
        if not self.temperature > 0:
            raise UserError(f"rectify.temperature={self.temperature}: expected a number above 0")

    def __call__(self, seen: Seen) -> Seen:
        """Return `seen` with the teacher's logits (B, K) right. UserError for maps, or images without labels."""
        logits_BK = only_logits(exact(seen.teacher(seen.output)), ASKING)
        label_B = seen.labels(ASKING)
        p_BK = (logits_BK / self.temperature).softmax(1)
        largest_B1, answer_B1 = p_BK.max(1, keepdim=True)
        behind_B1 = largest_B1 - p_BK.gather(1, label_B[:, None])
        wrong_B1 = (behind_B1 + self.threshold) / (1 + behind_B1)
        smallest = torch.finfo(p_BK.dtype).tiny  # where the label has all already; and log(0) would be no logit
        right_B1 = (self.threshold / (1 - largest_B1).clamp_min(smallest)).clamp_max(1)
        k_B1 = torch.where(answer_B1 == label_B[:, None], right_B1, wrong_B1)
        mixed_BK = torch.lerp(p_BK, F.one_hot(label_B, p_BK.shape[1]).to(p_BK), k_B1)
        return rewrite(seen, self.temperature * mixed_BK.clamp_min(smallest).log())
