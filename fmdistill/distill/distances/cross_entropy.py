"""Cross-entropy of the student's logits against the label."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.distances.kd import only_logits
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


@dataclass(frozen=True)
class CrossEntropy:
    """-log p_y of the student, one value per sample; what the label says, so no teacher is needed.

    With `smoothing` e the label is 1 - e of itself and e of the uniform distribution over all classes, its own
    included. (Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7.)
    """

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise UserError(f"distance.smoothing={self.smoothing}: expected a share, from 0 to below 1")

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B,) for logits (B, K). UserError for maps, and where the images carry no labels."""
        asking = "distance.name=cross_entropy"
        logits_BK = only_logits(seen.student(), asking)
        return F.cross_entropy(logits_BK, seen.labels(asking), reduction="none", label_smoothing=self.smoothing)
