"""Sample-wise re-weighting (SRW)."""

# Legend: B images, N patches per image, C or D channels, G images of the optimizer step, R groups of M entries.

from dataclasses import dataclass

from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.groups import Group, softmax_weights
from fmdistill.distill.weightings.similarity import similarities, spread
from fmdistill.registry import UserError


@dataclass(frozen=True)
class SRW:
    """Weighs a sample or patch more, the less similar it is to its group in the teacher's embedding.

    w_i = exp(-s_i / temperature) / sum_j exp(-s_j / temperature), with s_i the mean cosine to all entries of the group,
    itself included. The weights are multiplied by the number of entries, for a mean of one. (Yu et al., "Knowledge
    Distillation Dealing with Sample-wise Long-tail Problem", ACCV 2024, Eq. 4 to 6.) `reverse` drops the minus sign:
    the paper's ablation "Reversing".

    As in the paper, the group is the valid patches of an "image" for SAM and the images of a batch for CLIP. The paper
    does not say whether that batch is one device's ("batch", which also groups the patches of maps) or the whole batch
    of the optimizer step ("global_batch", with weights that depend neither on the number of processes nor on the
    accumulation). Nor does it state its temperatures for SAM and CLIP; it searched 0.5 to 1. Outside of training,
    "global_batch" is the batch.

    At 0.5 to 1 the weights of class-like features are nearly equal. With `relative`, which is not in the paper, the
    unit of the temperature is the standard deviation of the group's similarities, so that it means the same for any
    teacher.
    """

    temperature: float = 1.0
    feature: str | None = None  # teacher output whose similarities are used; None = the output that the term compares
    group: Group | None = None  # None = image for maps, global_batch for vectors
    reverse: bool = False
    relative: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"weighting.temperature={self.temperature}: expected a number above 0")

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return weights of the shape of the distance, (B, N) for maps of N patches or (B,) for vectors."""
        return self.weights(*similarities(distance, seen, self.feature, self.group)).view_as(distance)

    def weights(self, similarity: Tensor, valid: Tensor, own: Tensor | None = None) -> Tensor:
        """Return weights (R, M), or (1, B) if `own` is given, from the values that `similarities` returns."""
        temperature = self.temperature * (spread(similarity, valid) if self.relative else 1.0)
        temperature = temperature if self.reverse else -temperature
        return softmax_weights(similarity / temperature, valid, own if own is None else own / temperature)
