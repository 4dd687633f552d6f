"""Interactive contrastive learning (CLIP-KD)."""

# Legend: B images of a batch, G captions of the optimizer step, D the embedding's width.

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.distill.distances.texts import (
    FIRST_SCALE,
    LogitScale,
    check_captions,
    same_texts,
    unit_images,
    unit_texts,
)
from fmdistill.distill.seen import Seen


class ICL(nn.Module):
    """Cross-entropy of choosing an image's own caption by the student's embedding of the image, one value per image.

    With unit vectors s_i of the student and t_j of the captions, image i gets -log softmax_j(`scale` s_i . t_j) at its
    own caption, over all captions of the optimizer step. (Yang et al., "CLIP-KD", CVPR 2024: the image anchors of
    L_ICL.) If the caption occurs several times in the step, the target is spread evenly over its copies.

    CLIP-KD also has text anchors: the student's texts find the teacher's images, and it takes the mean of both. Here
    the student has no text tower of its own but the teacher's, frozen, so those terms are constants: they have no
    gradient, and are left out. To weigh the image anchors as CLIP-KD does, set the term's `scale: 0.5`.

    `scale` is learned, from CLIP's first value and up to 100, or fixed with `learned` false.
    """

    needs_captions = True

    def __init__(
        self,
        scale: float = FIRST_SCALE,
        learned: bool = True,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        check_captions(shapes, "icl")
        self.scale = LogitScale(scale, learned, "distance.scale")

    def forward(self, seen: Seen) -> Tensor:
        """Return (B,). Raises UserError for maps, and for a cache without captions."""
        (student_BD, _), (own_BD, step_GD) = unit_images(seen, "icl"), unit_texts(seen, "icl")
        logits_BG = self.scale() * student_BD @ step_GD.T
        return F.cross_entropy(logits_BG, same_texts(own_BD, step_GD), reduction="none")
