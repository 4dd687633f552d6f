"""Sample-wise re-weighting (SRW)."""

# Legend: B images, N patches an image, C or D channels, G images of the optimizer step, R groups of M entries.

from dataclasses import dataclass

from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import Group, softmax_weights
from fmdistill.distill.weightings.similarity import similarities, spread
from fmdistill.registry import UserError


@dataclass(frozen=True)
class SRW:
    """Weigh a sample or patch the more, the less similar it is to its group in the teacher's embedding.

    w_i = exp(-s_i / temperature) / sum_j exp(-s_j / temperature), s_i the mean cosine to all of the group, itself
    included; here times their count, for a mean of one. (Yu et al., "Knowledge Distillation Dealing with Sample-wise
    Long-tail Problem", ACCV 2024, Eq. 4 to 6.) `reverse` is the paper's ablation "Reversing", without the minus.

    The group is, as in the paper, the valid patches of an "image" for SAM and the images of a batch for CLIP. The paper
    leaves open whether that is what one device sees ("batch", which includes the patches of a map) or the whole batch
    of the optimizer step ("global_batch", so that weights depend neither on the processes nor on the accumulation),
    and its temperatures for SAM and CLIP; it searched 0.5 to 1. Outside of training "global_batch" is the batch.

    At 0.5 to 1 the weights of class-like features are nearly equal. With `relative`, which is not the paper's, the
    temperature counts in standard deviations of the group's similarities, so that it means the same for any teacher.
    """

    temperature: float = 1.0
    feature: str | None = None  # teacher output whose geometry weighs; None = the output that the term compares
    group: Group | None = None  # None = image for maps, global_batch for vectors
    reverse: bool = False
    relative: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"weighting.temperature={self.temperature}: expected a number above 0")

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return (B, N) weights for the (B, N) distance of N patches, or (B,) for (B,)."""
        return self.weights(*similarities(distance, seen, self.feature, self.group)).view_as(distance)

    def weights(self, similarity: Tensor, valid: Tensor, own: Tensor | None = None) -> Tensor:
        """Return (R, M) weights for what `similarities` returns."""
        temperature = self.temperature * (spread(similarity, valid) if self.relative else 1.0)
        temperature = temperature if self.reverse else -temperature
        return softmax_weights(similarity / temperature, valid, own if own is None else own / temperature)
