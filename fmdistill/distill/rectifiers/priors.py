"""Class statistics of the training images, for rectifiers."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fmdistill.registry import UserError


@dataclass(frozen=True)
class Priors:
    """Class statistics of the training images: `counts` (K,) is the number of images of each class.

    `means(output)` returns the mean of the teacher's `output` over the training images of each class, (K, D).
    """

    counts: Tensor
    means: Callable[[str], Tensor]

    def shares(self) -> Tensor:
        """Return each class's share of the training images, float64 (K,). Raises UserError if a class has none."""
        if not (self.counts > 0).all():
            raise UserError(
                f"rectify: class {int((self.counts > 0).int().argmin())} has no training image, so no frequency; "
                f"use a teacher and a source of images with the same classes"
            )
        return self.counts.double() / self.counts.sum()
