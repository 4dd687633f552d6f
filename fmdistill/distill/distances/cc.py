"""Correlation congruence (CC)."""

# Legend: B images, D dimensions compared, P = B - 1 pairs of consecutive images.

from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.distill.distances.mse import require_same_shape
from fmdistill.distill.distances.rkd import require_vectors
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


class CC(nn.Module):
    """Product |s_i - t_i| . |s_(i+1) - t_(i+1)| of consecutive images of the batch, one value per image.

    s and t are each embedded by a learned linear layer to `width` dimensions, or compared as they are if `width` is
    None. (Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, in the form of the authors'
    code; the paper uses a Gaussian kernel between all images instead. Common scale 0.02.) Since both embeddings learn,
    they can also shrink the value by shrinking themselves, so combine it with another term.

    Each of a pair's two images gets half of the pair's value; the first and the last image are in one pair only. The
    values are multiplied by B / (B - 1), so that their mean over the batch is the mean over the B - 1 pairs. The value
    is zero if the batch has a single image.
    """

    def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...], width: int | None = 128) -> None:
        super().__init__()
        for shape in (student, teacher):
            require_vectors(shape, "distance.name=cc")
        if width is not None and width < 1:
            raise UserError(f"distance.width={width}: expected at least 1 dimension, or null for no embedding")
        self.embed_student, self.embed_teacher = (
            nn.Identity() if width is None else nn.Linear(shape[0], width) for shape in (student, teacher)
        )
        self.width = width

    def forward(self, seen: Seen) -> Tensor:
        """Return (B,) for vectors (B, D). Raises UserError if `width` is None and their D differ."""
        student, teacher = require_same_shape(seen) if self.width is None else seen.pair()
        gap_BD = (self.embed_student(student) - self.embed_teacher(teacher)).abs()
        pair_P = (gap_BD[:-1] * gap_BD[1:]).sum(1)
        return (F.pad(pair_P, (0, 1)) + F.pad(pair_P, (1, 0))) / 2 * len(gap_BD) / max(1, len(pair_P))
