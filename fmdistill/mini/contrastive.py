"""Train a small CLIP from images and captions as CLIP was trained (Radford et al. 2021): task `contrastive`."""

# Legend: B images of the batch and their captions, L context length, D embedding channels.

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.backbones.clip import ClipPreprocess
from fmdistill.cache.batch import sample
from fmdistill.cache.prepare import PreparedImage, must_prepare
from fmdistill.distill import student as students
from fmdistill.distill.data import SplitImages
from fmdistill.distill.job import Job
from fmdistill.images import Encoded, captions
from fmdistill.images import build as build_images
from fmdistill.images.source import SPLITS
from fmdistill.mini.clip import MiniClip, tokenize
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

LARGEST_SCALE = 100.0


def contrastive(recipe: Recipe) -> Job:
    """Train image and text tower together from images and their captions."""
    student = students.build(recipe.student)
    if not isinstance(student, MiniClip):
        raise UserError(f"student.name={recipe.student['name']}: task contrastive trains clip_mini alone")
    images, rows = build_images(recipe.images), student.token_ids.clone()
    train, validation = (
        CaptionedImages(images, split, student.preprocess, rows, recipe.seed, memory=memory)
        for split, memory in zip(SPLITS, (recipe.train.image_memory, 0.0), strict=True)
    )
    return Job(Contrastive(student), student, train, validation)


class Contrastive(nn.Module):
    """CLIP's symmetric cross-entropy between the images and the captions of a batch, the logit scale at most 100.

    If a caption occurs several times in the batch, each of its images is right for each copy, and the target is spread
    evenly over them. The batch is that of one process and one forward pass, so more processes or accumulated steps add
    no negatives.
    """

    def __init__(self, student: MiniClip):
        super().__init__()
        self.student = student

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return "loss", its two halves, the error rates of the nearest caption and image, and the logit scale."""
        scale = self.student.clip.logit_scale
        with torch.no_grad():  # as CLIP does: at the end of the range the gradient can still lead back
            scale.clamp_(max=math.log(LARGEST_SCALE))
        image_BD = self.student(self.student.preprocess.normalize(batch["pixels"], batch["sizes"]))["embedding"]
        text_BD = self.student.encode_text(batch["tokens"])
        with torch.autocast(image_BD.device.type, enabled=False):
            return symmetric_cross_entropy(image_BD.float(), text_BD.float(), scale.exp(), same(batch["tokens"]))


def symmetric_cross_entropy(image_BD: Tensor, text_BD: Tensor, scale: Tensor, same_BB: Tensor) -> dict[str, Tensor]:
    """Return "loss", the mean of "image" (find the caption) and "text" (find the image), the errors and "logit_scale".

    `same_BB` (bool) marks the captions that are equal, and so share the target.
    """
    logits_BB = scale * F.normalize(image_BD, dim=1) @ F.normalize(text_BD, dim=1).T
    target_BB = same_BB / same_BB.sum(1, keepdim=True)
    image, text = F.cross_entropy(logits_BB, target_BB), F.cross_entropy(logits_BB.T, target_BB)
    with torch.no_grad():
        wrong = [~same_BB.gather(1, logits.argmax(1, keepdim=True)) for logits in (logits_BB, logits_BB.T)]
        errors = dict(zip(("image_error", "text_error"), (w.float().mean() for w in wrong), strict=True))
    return {"loss": (image + text) / 2, "image": image, "text": text, **errors, "logit_scale": scale.detach()}


def same(tokens_BL: Tensor) -> Tensor:
    """Return which captions are equal, bool (B, B)."""
    return (tokens_BL[:, None] == tokens_BL[None]).all(2)


@dataclass(frozen=True)
class CaptionedImages(SplitImages):
    """The captioned images of one split of a source; a caption is a line of an image's column `txt`."""

    preprocess: ClipPreprocess
    token_ids: Tensor  # on the CPU: the tokens that the student knows
    seed: int

    def _prepare(self, name: str, encoded: Encoded) -> PreparedImage:
        """Return the image, its `extra` the captions."""
        texts = captions(name, encoded)
        if not texts:
            raise UserError(
                f"{name}: image '{encoded.key}' has no caption; task contrastive needs one for each, such as KEY.txt "
                f"in a tar"
            )
        return must_prepare(self.images, self.preprocess, encoded, name)._replace(extra=texts)

    def item(self, epoch: int, shard: int, index: int) -> dict[str, Any]:
        """Return pixels, size, and the tokens (L,) of a caption drawn from (seed, epoch, key)."""
        image = self.prepared(shard, index, self._prepare)
        rng = np.random.default_rng([self.seed, epoch, zlib.crc32(image.key.encode())])
        text = image.extra[rng.integers(len(image.extra))]
        return {**sample(image), "tokens": tokenize([text], self.token_ids)[0]}
