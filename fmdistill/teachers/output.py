"""Describe a teacher's outputs for one image: the shape of each, and which of its tokens are valid."""

from dataclasses import dataclass
from typing import Literal

from fmdistill.registry import UserError

Shape = tuple[int, ...]
Tokens = Literal["image", "all"]
CAPTION = "caption"  # the embedding of an image's caption, a vector of the width of the image's own


@dataclass(frozen=True)
class Output:
    """One output of a teacher for one image, float32: a map (C, g, g) or a vector (D,).

    `tokens` is "image" for a map whose grid covers the padded image, so that a token is valid if it contains any real
    pixel; "all" for a map whose tokens are all valid; None for a vector. If this output contains SRW similarities
    (2, g, g), `of` names their map; otherwise it is None.
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
        """Return whether the output is one vector per image, not a map."""
        return self.tokens is None


def caption_names(count: int) -> list[str]:
    """Return the names of the outputs that are the embeddings of an image's captions, `count` of them."""
    return [CAPTION if number == 1 else f"{CAPTION}_{number}" for number in range(1, count + 1)]
