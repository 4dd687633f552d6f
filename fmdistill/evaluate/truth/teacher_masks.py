"""Take the teacher's own masks at a grid of points as instances, for images without annotations."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fmdistill.evaluate.grid_miou import grid_points
from fmdistill.evaluate.masks import to_rle
from fmdistill.evaluate.results import TEACHER
from fmdistill.evaluate.segmenters import SegmentedImage
from fmdistill.evaluate.truth.instances import ImageTruth, JoinedTruth, Skip, of_mask
from fmdistill.registry import UserError


@dataclass(frozen=True)
class TeacherMasks:
    """The teacher's masks at grid x grid points, each the one of three with the highest predicted IoU."""

    grid: int = 5  # points a side, at (i + 1/2) / grid of width and height
    annotations: str = ""  # not used

    def check(self) -> None:
        """Raise a UserError for settings that make no masks."""
        if self.grid < 1:
            raise UserError(f"truth.grid={self.grid}: needs at least 1 point a side")
        if self.annotations:
            raise UserError(f"annotations={self.annotations}: would be ignored, the truth is the teacher's masks")

    def join(self, names: Sequence[str]) -> JoinedTruth:
        """Return the truth of all images."""
        self.check()
        return JoinedTruth(names, partial(_of, self.grid))


def _of(grid: int, image: SegmentedImage) -> ImageTruth:
    if TEACHER not in image.segmenters:
        raise UserError("truth.name=teacher: the teacher is not at hand; use its cache's images, or set teacher=true")
    segmenter = image.segmenters[TEACHER]
    points_P2 = grid_points(grid, image.original)
    logits_PMnn, predicted_PM = segmenter.decode(points_P2[:, None], np.ones((len(points_P2), 1)))
    instances, skipped = [], []
    for number, (best, (x, y)) in enumerate(zip(predicted_PM.argmax(1).tolist(), points_P2.tolist(), strict=True)):
        mask_HW = (segmenter.upsample(logits_PMnn[number : number + 1, best : best + 1])[0, 0] > 0).cpu().numpy()
        if mask_HW.any():
            instances.append(of_mask(number, mask_HW, to_rle(mask_HW), (x, y)))
        else:
            skipped.append(Skip("mask empty", f"{image.name}: the teacher's mask at ({x:g}, {y:g})"))
    return ImageTruth(tuple(instances), tuple(skipped))
