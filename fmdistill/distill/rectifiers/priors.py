"""What rectifiers know of the classes before training."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fmdistill.registry import UserError


@dataclass(frozen=True)
class Priors:
    """What is known of the classes before training: `counts` (K,) are the training images of each class.

    `means(output)` gives the teacher's mean `output` of each class over the training images, (K, D).
    """

    counts: Tensor
    means: Callable[[str], Tensor]

    def shares(self) -> Tensor:
        """Return each class's share of the training images, float64 (K,). UserError for a class without any."""
        if not (self.counts > 0).all():
            raise UserError(
                f"rectify: class {int((self.counts > 0).int().argmin())} has no training image, and so no frequency; "
                f"take a teacher and a source of the same classes"
            )
        return self.counts.double() / self.counts.sum()
