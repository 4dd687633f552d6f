"""CLIP's own loss for the student's images and the teacher's texts."""

# Legend: G images of the optimizer step and their captions, D the embedding's width.

from collections.abc import Mapping

from torch import Tensor, nn

from fmdistill.distill.distances.texts import (
    FIRST_SCALE,
    LogitScale,
    both_ways,
    check_captions,
    same_texts,
    unit_images,
    unit_texts,
)
from fmdistill.distill.seen import Seen


class ContrastiveDistance(nn.Module):
    """CLIP's symmetric cross-entropy of finding captions by images and images by captions, one value per image.

    With unit vectors s_i of the student and t_j of the captions, image i gets half of -log softmax_j(`scale` s_i . t_j)
    at its own caption, over all captions of the optimizer step, and half of that of its caption, over all images.
    (Radford et al. 2021; the task loss of CLIP-KD.) If a caption occurs several times in the step, each of its images
    is right for each copy, and the target is spread evenly over them.

    The teacher's images take no part. The text tower is the teacher's, frozen, so the first half is `ICL`.

    `scale` is learned, from CLIP's first value and up to 100, or fixed with `learned` false. In training, memory grows
    with the square of the step's images.
    """

    over_step = True
    needs_captions = True

    def __init__(
        self,
        scale: float = FIRST_SCALE,
        learned: bool = True,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        check_captions(shapes, "contrastive")
        self.scale = LogitScale(scale, learned, "distance.scale")

    def forward(self, seen: Seen) -> Tensor:
        """Return (G,). Raises UserError for maps, and for a cache without captions."""
        (student_GD, _), (text_GD, _) = unit_images(seen, "contrastive"), unit_texts(seen, "contrastive")
        share_GG = same_texts(text_GD, text_GD)
        return both_ways(self.scale() * student_GD @ text_GD.T, share_GG, share_GG)
