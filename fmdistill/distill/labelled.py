"""Images with exact object masks and prompts drawn from them, for the task `promptable`."""

import io
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch

from fmdistill.backbones.sam import SamPreprocess
from fmdistill.cache.batch import sample
from fmdistill.cache.prepare import PreparedImage, must_prepare
from fmdistill.distill.data import SplitImages
from fmdistill.distill.promptable import sample_prompts
from fmdistill.images import Encoded
from fmdistill.registry import UserError

COLUMN = "labels.png"


def check_size(shard: str, key: str, size: tuple[int, int], original: tuple[int, int]) -> None:
    """Raise a UserError if masks of `size` (H, W) do not fit an image of `original` (H, W), its EXIF turn applied."""
    if size != original:
        raise UserError(
            f"{shard}: image '{key}' is {original[1]} x {original[0]}, its {COLUMN} {size[1]} x {size[0]}; if "
            f"the masks are of the pixels as stored, set images.orientation=ignore"
        )


@dataclass(frozen=True)
class LabelledImages(SplitImages):
    """One split of a source whose images carry a `labels.png` column: object ids per pixel, 0 = background."""

    preprocess: SamPreprocess
    prompts: int
    seed: int
    background: float = 0.1  # share of the prompts that ask for the background

    def _prepare(self, name: str, encoded: Encoded) -> PreparedImage:
        """Return the image, its `extra` the object ids, uint8 (h, w) without padding."""
        if COLUMN not in encoded.extra:
            raise UserError(
                f"{name}: image '{encoded.key}' has no {COLUMN}; task promptable needs exact masks, as `scenes` has"
            )
        image = must_prepare(self.images, self.preprocess, encoded, name)
        h, w = image.size
        with PIL.Image.open(io.BytesIO(encoded.extra[COLUMN])) as picture:
            check_size(name, encoded.key, (picture.height, picture.width), image.original)
            objects = np.asarray(picture.resize((w, h), PIL.Image.Resampling.NEAREST))
        return image._replace(extra=objects)

    def item(self, epoch: int, shard: int, index: int) -> dict[str, Any]:
        """Return pixels, size, objects int32 (S, S) with -1 for padding, and prompts drawn from (seed, epoch, key)."""
        image = self.prepared(shard, index, self._prepare)
        key, (h, w), objects = image.key, image.size, image.extra
        labels = np.full((self.preprocess.image_size,) * 2, -1, np.int32)
        labels[:h, :w] = objects
        rng = np.random.default_rng([self.seed, epoch, zlib.crc32(key.encode())])
        points, target, boxes, use_box = sample_prompts(labels, rng, self.prompts, background=self.background)
        return {
            **sample(image),
            "objects": torch.from_numpy(labels),
            "points": torch.from_numpy(points),
            "target": torch.from_numpy(np.asarray(target)),
            "boxes": torch.from_numpy(boxes),
            "use_box": torch.from_numpy(np.asarray(use_box)),
        }
