"""Compare a CLIP's exported files with its PyTorch student on pictures and texts, before they are published."""

# Legend: N pictures or texts, L the context length, D the embedding's width.

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmdistill.export.clip_towers import ClipTowers
from fmdistill.registry import UserError

LIMITS = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.95}  # the smallest cosine that is published without being asked for
TEXTS = (
    "a photo of a cat",
    "a diagram",
    "An astronaut in front of a rocket, smiling.",
    "two cups of coffee; one's empty!",
    "a plain red circle",
    "une photo d'un caf\u00e9 \u00e0 No\u00ebl",
    "1234567890 & more",
    "a very long caption that describes every thing in the picture: " + ", ".join(["a tree", "a house", "a dog"] * 12),
    "",
)
NAMES = "cat dog bird car tree house street beach mountain person face hand cup book flower star circle square".split()
CALIBRATION_TEXTS = tuple(f"{start} {name}" for name in NAMES for start in ("a photo of a", "the small red", ""))
Embed = Callable[[np.ndarray], np.ndarray]  # normalised float32 (N, 3, S, S), or int64 tokens (N, L) -> (N, D)


def pixels(towers: ClipTowers, pictures: Sequence[np.ndarray]) -> Tensor:
    """Return pictures uint8 (H, W, 3) as the student takes them, float32 (N, 3, S, S)."""
    prepared, sizes = zip(*map(towers.preprocess.prepare, pictures), strict=True)
    return towers.preprocess.normalize(torch.stack(prepared), torch.tensor(sizes))


def compare(
    towers: ClipTowers,
    image: Embed,
    text: Embed,
    pictures: Sequence[np.ndarray],
    tokens_NL: np.ndarray,
    precision: str,
    min_cosine: float | None,
) -> dict[str, Any]:
    """Return the figures of a comparison: cosines of the exported embeddings with those of PyTorch.

    `tokens_NL` are the ids of TEXTS by the exported tokenizer. Raises UserError if the smallest cosine is below
    `min_cosine`, by default the precision's in LIMITS, or is not a number; or if the tokens lead to another embedding.
    """
    photos, own_tokens = pixels(towers, pictures), towers.tokenizer(list(TEXTS))
    with torch.no_grad():
        own = {"image": towers.student(photos)["embedding"], "text": towers.text_model.encode_text(own_tokens)}
    exported = {"image": image(photos.numpy()), "text": text(tokens_NL)}
    limit = LIMITS[precision] if min_cosine is None else min_cosine
    figures: dict[str, Any] = {"pictures": len(photos), "texts": len(TEXTS), "min_cosine": limit}
    for tower, expected in own.items():
        cosines = nn.functional.cosine_similarity(torch.from_numpy(exported[tower]).double(), expected.double(), dim=-1)
        least = float(cosines.min())
        if not least >= limit:  # a NaN too
            raise UserError(
                f"precision={precision}: the {tower} tower's embeddings differ from the student's, cosine {least:.5f} "
                f"is below {limit}; nothing was written. {_way_out(least)}"
            )
        figures[f"{tower}_cosine"] = {"min": least, "mean": float(cosines.mean())}
    figures["tokens_equal"] = bool(np.array_equal(_content(tokens_NL), _content(own_tokens.numpy())))
    return figures


def _content(tokens_NL: np.ndarray) -> np.ndarray:
    """Return the tokens without what follows the first of the largest number, the end token of OpenAI's tokenizer."""
    ended = np.arange(tokens_NL.shape[1]) > tokens_NL.argmax(axis=1)[:, None]
    return np.where(ended, 0, tokens_NL)


def _way_out(cosine: float) -> str:
    if np.isnan(cosine):  # which no limit accepts
        return "Use another precision, or train a student without NaN"
    return f"Use another precision, or accept it with min_cosine={np.floor(cosine * 1000) / 1000}"
