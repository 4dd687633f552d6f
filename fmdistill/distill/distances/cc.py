"""Correlation congruence (CC)."""

# Legend: B images, D dimensions compared, P = B - 1 pairs of consecutive images.

from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.distill.distances.mse import same_shape
from fmdistill.distill.distances.rkd import only_vectors
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


class CC(nn.Module):
    """|s_i - t_i| . |s_(i+1) - t_(i+1)| of the batch's consecutive images, one value per image.

    s and t are embedded by a learned linear layer each, to `width` dimensions; None compares them as they are. (Peng
    et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, in the form of the authors' code; the paper
    has a Gaussian kernel between all images instead. Common scale 0.02.) As both embeddings learn, they can also make
    it small by growing small: keep another term beside it.

    A pair's value is shared half and half by its two images, so that the first and the last, which are in one pair
    alone, have half of one; times B / (B - 1), so that the mean over the batch is the mean over the B - 1 pairs. An
    image alone in its batch has no pair, and zero.
    """

    def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...], width: int | None = 128) -> None:
        super().__init__()
        for shape in (student, teacher):
            only_vectors(shape, "distance.name=cc")
        if width is not None and width < 1:
            raise UserError(f"distance.width={width}: expected at least 1 dimension, or null for no embedding")
        self.embed_student, self.embed_teacher = (
            nn.Identity() if width is None else nn.Linear(shape[0], width) for shape in (student, teacher)
        )
        self.width = width

    def forward(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors (B, D). UserError where they are not embedded and their D differ."""
        student, teacher = same_shape(seen) if self.width is None else seen.pair()
        gap_BD = (self.embed_student(student) - self.embed_teacher(teacher)).abs()
        pair_P = (gap_BD[:-1] * gap_BD[1:]).sum(1)
        return (F.pad(pair_P, (0, 1)) + F.pad(pair_P, (1, 0))) / 2 * len(gap_BD) / max(1, len(pair_P))
