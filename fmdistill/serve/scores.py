"""Score an image against labels that a person types, by a CLIP's text tower and each network's embedding."""

# Legend: K labels, D the shared embedding's width.

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmdistill import evaluate
from fmdistill.evaluate.text_classifier import class_names, classifier, templates
from fmdistill.evaluate.zeroshot import Zeroshot
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.serve.subjects import OpenedRuns

MOST_LABELS, MOST_TEMPLATES, LONGEST = 100, 8, 200
TEMPLATES = ["a photo of a {}."]
HELD = 16  # sets of labels whose text embeddings are in memory


@dataclass(frozen=True)
class Wording:
    """The labels to compare an image with, and the templates that make texts of them."""

    labels: tuple[str, ...]
    templates: tuple[str, ...]

    @classmethod
    def from_json(cls, stated: Any) -> "Wording":
        """Return the wording of a request, {"labels": [...], "templates": [...]}. Raises UserError if it is none."""
        if not isinstance(stated, Mapping):
            raise UserError(f"request {stated!r}: expected an object with labels and templates")
        labels = _texts(stated.get("labels"), "labels", MOST_LABELS)
        prompts = _texts(stated.get("templates") or TEMPLATES, "templates", MOST_TEMPLATES)
        return cls(tuple(dict.fromkeys(labels)), tuple(templates(prompts)))


class TextEmbeddings:
    """The text embeddings of the last wordings, unit columns (D, K) each."""

    def __init__(self, opened: OpenedRuns) -> None:
        self.opened = opened
        self._held: OrderedDict[Wording, Tensor] = OrderedDict()
        self._computing = threading.Lock()

    def of(self, wording: Wording) -> Tensor:
        """Return unit columns (D, K), float32 on the CPU."""
        with self._computing:
            if wording not in self._held:
                head, device = self.opened.head, self.opened.device
                self._held[wording] = classifier(head, wording.labels, wording.templates, device, None)
            self._held.move_to_end(wording)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
            return self._held[wording]


def score(embedding_D: Tensor, text_DK: Tensor, scale: float) -> dict[str, list[float]]:
    """Return the cosine of an image and each label, and the softmax of `scale` times the cosines."""
    cosine_K = F.normalize(embedding_D.float().cpu(), dim=0) @ text_DK
    return {"cosine": cosine_K.tolist(), "probability": torch.softmax(scale * cosine_K, 0).tolist()}


def of_protocols(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return the class names and templates of the recipe's first zero-shot protocol; no names without one."""
    for path in recipe.protocols:
        try:
            evaluator = evaluate.load(path).evaluator
            if isinstance(evaluator, Zeroshot):
                prompts = templates(evaluator.templates)
                return class_names(evaluator.classnames), prompts if len(prompts) <= MOST_TEMPLATES else TEMPLATES
        except UserError:  # a file that is not on this machine
            continue
    return [], TEMPLATES


def _texts(values: Any, what: str, most: int) -> Sequence[str]:
    texts = [value.strip() for value in values if isinstance(value, str)] if isinstance(values, list) else []
    texts = [text for text in texts if text]
    if not texts or len(texts) > most:
        raise UserError(f"{what}: expected 1 to {most} texts, got {len(texts)}")
    if longest := next((text for text in texts if len(text) > LONGEST), None):
        raise UserError(f"{what}: '{longest[:30]}...' has {len(longest)} characters, at most {LONGEST} are read")
    return texts
