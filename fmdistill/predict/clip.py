"""Embed images and texts with both towers of a CLIP, and classify images by the names of classes."""

# Legend: N images, L texts or labels, T templates, B images of a batch, S the square's side, D the embedding's width.

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.backbones.clip import ClipPreprocess, TextHead
from fmdistill.predict.pixels import ImageLike, each_rgb
from fmdistill.registry import UserError
from fmdistill.teachers.compute import full_precision

BATCH = 32
TEMPLATE = "a photo of a {}."  # OpenAI's
EmbedImages = Callable[[np.ndarray], np.ndarray]  # normalised float32 (B, 3, S, S) -> (B, D)
EmbedTexts = Callable[[list[str]], np.ndarray]  # -> (L, D)


class ClipPredictor:
    """A CLIP that embeds images and texts into one space, and classifies images by texts.

    `image` and `text` are the towers, whose embeddings need not be normalised; `preprocess` prepares an image for the
    first, and `scale` is the factor of the cosine similarities, 100 in OpenAI's models.
    """

    def __init__(self, image: EmbedImages, text: EmbedTexts, preprocess: ClipPreprocess, scale: float) -> None:
        self._image, self._text = image, text
        self.preprocess, self.scale = preprocess, scale

    def encode_image(self, images: ImageLike | Sequence[ImageLike], batch: int = BATCH) -> np.ndarray:
        """Return unit embeddings float32 (N, D) of one image or several: paths, PIL images, or uint8 (H, W, 3) in RGB.

        Raises UserError for anything else, and for a file that cannot be decoded.
        """
        pixels = each_rgb(images)
        if not pixels:
            raise UserError("images: the list is empty; give at least one image")
        return _unit(np.concatenate([self._embed(pixels[i : i + batch]) for i in range(0, len(pixels), batch)]))

    def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Return unit embeddings float32 (L, D) of one text or several. Raises UserError unless they are texts."""
        return _unit(self._text(_texts(texts, "texts")))

    def classify(
        self,
        images: ImageLike | Sequence[ImageLike],
        labels: Sequence[str],
        templates: str | Sequence[str] = TEMPLATE,
        batch: int = BATCH,
    ) -> np.ndarray:
        """Return the probability of each label for each image, float32 (N, L); each row sums to one.

        Each label is put into every template in place of {}; its embeddings are averaged, as open_clip does. `images`
        are as for `encode_image`. Raises UserError if there is no label or a template has no {}.
        """
        label_LD = self._classifier(_texts(labels, "labels"), _texts(templates, "templates"))
        logits_NL = self.scale * (self.encode_image(images, batch) @ label_LD.T).astype(np.float64)
        odds_NL = np.exp(logits_NL - logits_NL.max(axis=1, keepdims=True))
        return (odds_NL / odds_NL.sum(axis=1, keepdims=True)).astype(np.float32)

    def _embed(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        prepared, sizes = zip(*map(self.preprocess.prepare, pixels), strict=True)
        normalised_B3SS = self.preprocess.normalize(torch.stack(prepared), torch.tensor(sizes))
        return self._image(normalised_B3SS.numpy())

    def _classifier(self, labels: list[str], templates: list[str]) -> np.ndarray:
        wrong = next((template for template in templates if template.count("{}") != 1), None)
        if wrong is not None:
            raise UserError(f"templates: {wrong!r} needs {{}} once, for the label, as in {TEMPLATE!r}")
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        prompt_LTD = self.encode_text(prompts).reshape(len(labels), len(templates), -1)
        return _unit(prompt_LTD.mean(axis=1))


def torch_predictor(
    image_tower: nn.Module, head: TextHead, preprocess: ClipPreprocess, device: torch.device
) -> ClipPredictor:
    """Return the predictor of a student, or any network that returns {"embedding": (B, D)}, and a text tower."""
    tower, head = image_tower.to(device).eval(), head.to(device).eval()

    @torch.inference_mode()
    def embed(image_B3SS: np.ndarray) -> np.ndarray:
        with full_precision():
            return _array(tower(torch.from_numpy(image_B3SS).to(device))["embedding"])

    @torch.inference_mode()
    def embed_texts(texts: list[str]) -> np.ndarray:
        with full_precision():
            return _array(head.encode_text(texts))

    return ClipPredictor(embed, embed_texts, preprocess, head.scale)


def _array(embedding: Tensor) -> np.ndarray:
    return embedding.float().cpu().numpy()


def _unit(embedding_ND: np.ndarray) -> np.ndarray:
    return F.normalize(torch.from_numpy(np.asarray(embedding_ND, np.float32)), dim=-1).numpy()


def _texts(texts: Any, what: str) -> list[str]:
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed or not all(isinstance(text, str) for text in listed):
        raise UserError(f"{what}: expected a list of texts, got {listed!r:.80}")
    return listed
