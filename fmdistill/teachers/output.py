"""State what a teacher gives for one image: the shape of each output and which of its tokens are real."""

from dataclasses import dataclass
from typing import Literal

from fmdistill.registry import UserError

Shape = tuple[int, ...]
Tokens = Literal["image", "all"]


@dataclass(frozen=True)
class Output:
    """One output of a teacher for one image, float32: a map (C, g, g) or a vector (D,).

    `tokens` is "image" for a map whose grid lies over the padded image, so that a token is valid if it holds any real
    pixel; "all" for a map of which every token counts; None for a vector. `of` names the map whose SRW similarities
    (2, g, g) this output holds; None for an output of its own.
    """

    shape: Shape
    tokens: Tokens | None = None
    of: str | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) != (len(self.shape) == 1) or len(self.shape) not in (1, 3):
            raise UserError(
                f"teacher output of shape {self.shape} with tokens={self.tokens!r}: expected (D,) with None, or "
                f"(C, g, g) with 'image' or 'all'"
            )

    @property
    def is_vector(self) -> bool:
        """Return whether an image has one vector instead of a map."""
        return self.tokens is None
