"""Swap the logits of a teacher's wrong answer and of the label."""

# Legend: B images, K classes.

from dataclasses import dataclass

from fmdistill.distill.distances.kd import only_logits
from fmdistill.distill.rectifiers.rewrite import rewrite
from fmdistill.distill.seen import Seen, exact

ASKING = "rectify.name=probability_swap"


@dataclass(frozen=True)
class ProbabilitySwap:
    """Where the teacher's largest logit is not the label's, swap these two, at any temperature the probabilities too.

    ("Probability shift" of Wen et al., "Preparing Lessons: Improve Knowledge Distillation with Better Supervision",
    2019.) Here also for the wrong predictions that KRDistill (arXiv 2409.07694) rectifies in a way we do not know.
    """

    def __call__(self, seen: Seen) -> Seen:
        """Return `seen` with the teacher's logits (B, K) right. UserError for maps, or images without labels."""
        logits_BK = only_logits(exact(seen.teacher(seen.output)), ASKING)
        label_B1 = seen.labels(ASKING)[:, None]
        largest_B1, answer_B1 = logits_BK.max(1, keepdim=True)
        swapped_BK = logits_BK.scatter(1, answer_B1, logits_BK.gather(1, label_B1))
        return rewrite(seen, swapped_BK.scatter(1, label_B1, largest_B1))
