"""Load images with exact object masks and draw prompts from the masks, for the task `promptable`."""

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
    """The images of one split of a source with a column `labels.png`: object ids per pixel, 0 = background."""

    preprocess: SamPreprocess
    prompts: int
    seed: int
    background: float = 0.1  # share of the prompts that ask for the background
    small: float = 0.25  # an object's chance to be prompted falls with this power of its area

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
        points, target, boxes, use_box = sample_prompts(
            labels, rng, self.prompts, background=self.background, small=self.small
        )
        return {
            **sample(image),
            "objects": torch.from_numpy(labels),
            "points": torch.from_numpy(points),
            "target": torch.from_numpy(np.asarray(target)),
            "boxes": torch.from_numpy(boxes),
            "use_box": torch.from_numpy(np.asarray(use_box)),
        }


def sample_prompts(
    labels: np.ndarray,
    rng: np.random.Generator,
    n: int,
    box_share: float = 0.3,
    min_area: int = 12,
    background: float = 0.1,
    small: float = 0.25,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return points (n, 2) xy, target ids (n,), noisy boxes (n, 4) xyxy and use_box (n,) for labels (S, S).

    Objects of at least `min_area` visible pixels are drawn in proportion to area^-small, which favours small objects,
    and the point is uniform over the object. A share `background` of the prompts is for the background, which most
    points of a grid hit, as are all prompts of an image without objects. Boxes are jittered by SAM's noise: a tenth of
    the side, at most 20 / 1024 of the image.
    """
    flat, size = labels.ravel(), labels.shape[1]
    areas = np.bincount(flat + 1)[1:]  # padding is -1
    objects = np.flatnonzero(areas >= min_area)
    objects = objects[objects > 0]
    if not len(objects):
        objects = np.flatnonzero(areas > 0)[-1:]
    chance = areas[objects] ** -small
    target = rng.choice(objects, n, p=chance / chance.sum())
    if areas[0] >= min_area:
        target[rng.random(n) < background] = 0
    points, boxes = np.empty((n, 2), np.float32), np.empty((n, 4), np.float32)
    for number in np.unique(target):
        prompts = target == number
        inside = np.flatnonzero(flat == number)
        chosen = rng.choice(inside, prompts.sum())
        points[prompts] = np.stack([chosen % size, chosen // size], axis=1)
        columns = inside % size
        boxes[prompts] = columns.min(), inside[0] // size, columns.max(), inside[-1] // size
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    noise = rng.normal(size=(n, 4)) * sides * 0.1
    limit = 20 * size / 1024
    boxes = (boxes + np.clip(noise, -limit, limit)).clip(0, size - 1).astype(np.float32)
    return points, target, boxes, (rng.random(n) < box_share) & (target > 0)
