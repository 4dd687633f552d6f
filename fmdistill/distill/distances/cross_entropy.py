"""Cross-entropy of the student's logits against the label."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fmdistill.distill.distances.kd import require_logits
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy -log p_y of the student against the label y, one value per sample; it needs no teacher.

    With `smoothing` e, the target is (1 - e) onehot(y) + e / K for each of the K classes, y included. (Szegedy et al.,
    "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7.)
    """

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise UserError(f"distance.smoothing={self.smoothing}: expected a share, from 0 to below 1")

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B,) for logits (B, K). Raises UserError for maps, or if an image has no label."""
        setting = "distance.name=cross_entropy"
        logits_BK = require_logits(seen.student(), setting)
        return F.cross_entropy(logits_BK, seen.labels(setting), reduction="none", label_smoothing=self.smoothing)
