"""Every valid entry counts the same."""

from dataclasses import dataclass

from torch import Tensor

from fmdistill.distill.seen import Seen


@dataclass(frozen=True)
class Uniform:
    """Weight one for every valid entry."""

    def __call__(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return ones where valid, zeros elsewhere, of the distance's shape."""
        return (
            seen.valid.to(distance.dtype).expand_as(distance)
            if distance.dim() > 1
            else distance.new_ones(len(distance))
        )
