"""Swap the logits of a teacher's wrong answer and of the label."""

# Legend: B images, K classes.

from dataclasses import dataclass

from fmdistill.distill.distances.kd import require_logits
from fmdistill.distill.rectifiers.rewrite import replace_teacher_output
from fmdistill.distill.seen import Seen, at_least_float32

SETTING = "rectify.name=probability_swap"


@dataclass(frozen=True)
class ProbabilitySwap:
    """Swaps the teacher's largest logit with the label's, which also swaps their probabilities at any temperature.

    ("Probability shift" of Wen et al., "Preparing Lessons: Improve Knowledge Distillation with Better Supervision",
    2019.) It also stands in for KRDistill (arXiv 2409.07694), whose way of rectifying wrong predictions is not
    published.
    """

    def __call__(self, seen: Seen) -> Seen:
        """Return `seen` with the teacher's logits (B, K) corrected. Raises UserError for maps, or without labels."""
        logits_BK = require_logits(at_least_float32(seen.teacher(seen.output)), SETTING)
        label_B1 = seen.labels(SETTING)[:, None]
        largest_B1, answer_B1 = logits_BK.max(1, keepdim=True)
        swapped_BK = logits_BK.scatter(1, answer_B1, logits_BK.gather(1, label_B1))
        return replace_teacher_output(seen, swapped_BK.scatter(1, label_B1, largest_B1))
