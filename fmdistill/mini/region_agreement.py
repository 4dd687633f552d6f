"""Score a promptable model on photographs without exact masks, by their regions of colour and texture.

Letters: P points of one photograph, H x W its pixels, h x w resized pixels (before padding to SAM's square input).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import PIL.Image
import torch
from skimage.measure import label
from torch import nn

from fmdistill import stop
from fmdistill.backbones.device import pick_device
from fmdistill.evaluate import results
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.results import STUDENT, Judged, Metric
from fmdistill.evaluate.subjects import embed
from fmdistill.mini.photos import PHOTOGRAPHS, photograph
from fmdistill.mini.regions import folder_photographs, open_photograph, segment
from fmdistill.mini.sam import MiniSam, check_makes_masks, must_make_masks
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError


@dataclass(frozen=True)
class RegionAgreement:
    """Judge a grid of points on whole photographs: does one of the three masks fit a region around the point?

    A photograph is divided into regions at several `scales` (see `regions.segment`); a point's agreement is the best
    IoU of masks 1 to 3 with the point's region at any scale. `components` counts the connected parts of that mask:
    an object or a region has one or two, a mask that follows the token grid has many.
    """

    grid: int = 6  # points a side
    side: int = 384  # pixels: the photographs' long side
    scales: tuple[float, ...] = (150.0, 500.0, 1500.0)
    smallest: int = 60  # pixels: the least size of a region
    sigma: float = 1.0  # pixels
    folder: str | None = None  # photographs judged besides those of the source `photos` for validation
    device: str = "auto"

    metrics: ClassVar[Mapping[str, Metric]] = {
        "agreement": Metric(
            "IoU with a region",
            percent=True,
            better="higher",
            end=1.0,
            help="IoU × 100 of the best of three masks with the point's region, the best of all scales.",
        ),
        "components": Metric(
            "Parts of a mask",
            across="average",
            better="lower",
            help="Connected parts of the mask that agrees best with a region.",
        ),
    }

    def __post_init__(self) -> None:
        """Raise a UserError for settings that would measure nothing."""
        if self.grid < 1:
            raise UserError(f"grid={self.grid}: needs at least 1 point a side")
        if self.side < 16:
            raise UserError(f"side={self.side}: needs at least 16 pixels")
        if not self.scales:
            raise UserError("scales=[]: needs at least one scale")
        if self.folder is not None:
            folder_photographs(self.folder, "folder")

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a student that makes no masks."""
        check_makes_masks(recipe.student.get("name"), "region_agreement")

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module]) -> Judged:
        """Score the student on the photographs; the recipe's images are not read."""
        (model,) = students.values()
        student = must_make_masks(model, recipe.student["name"], "region_agreement")
        student.to(pick_device(self.device, "device")).eval()
        points = [
            (name, score)
            for name, pixels in stop.between(self._photographs())
            for score in judge_photograph(self, student, pixels)
        ]
        means = Means()
        for name, score in points:
            means.add(name, STUDENT, "agreement", [score.agreement])
            means.add(name, STUDENT, "components", [score.components], average="mean")
        median = np.median([score.components for _, score in points])
        rows = [*means.rows(), results.row(STUDENT, "components", median, len(points), average="median")]
        return rows, {
            "points": [{"photograph": name} | score._asdict() for name, score in points],
            **means.details(),
        }

    def _photographs(self) -> Iterator[tuple[str, np.ndarray]]:
        for name in PHOTOGRAPHS["validation"]:
            yield name, self._resize(photograph(name))
        if self.folder is not None:
            for name in folder_photographs(self.folder, "folder"):
                yield name, self._resize(open_photograph(self.folder, name))

    def _resize(self, pixels: np.ndarray) -> np.ndarray:
        image = PIL.Image.fromarray(pixels)
        scale = self.side / max(image.size)
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        return np.asarray(image.resize(size, PIL.Image.Resampling.BICUBIC))


class PointScore(NamedTuple):
    """A point's place in pixels, the agreement of its best mask with a region, and the parts of that mask."""

    point: tuple[float, float]
    agreement: float
    components: int


@torch.inference_mode()
def judge_photograph(protocol: RegionAgreement, student: MiniSam, pixels: np.ndarray) -> list[PointScore]:
    """Return the scores of a grid of points on a photograph uint8 (H, W, 3)."""
    height, width = pixels.shape[:2]
    regions = [segment(pixels, scale, protocol.sigma, protocol.smallest) for scale in protocol.scales]
    places = (np.arange(protocol.grid) + 0.5) / protocol.grid
    xy_P2 = np.stack(np.meshgrid(places * width, places * height), axis=-1).reshape(-1, 2)
    scores = []
    for (x, y), masks_3HW in zip(xy_P2.tolist(), predict(student, pixels, xy_P2), strict=True):
        around = [labels == labels[int(y), int(x)] for labels in regions]
        iou_3S = np.array([[_iou(mask, region) for region in around] for mask in masks_3HW])
        best = masks_3HW[iou_3S.max(axis=1).argmax()]
        scores.append(PointScore((x, y), float(iou_3S.max()), parts(best)))
    return scores


def parts(mask_HW: np.ndarray) -> int:
    """Return the number of connected parts of a bool mask; pixels that touch at a corner are connected."""
    labels: Any = label(mask_HW, connectivity=2)
    return int(labels.max())


def predict(student: MiniSam, pixels: np.ndarray, xy_P2: np.ndarray) -> np.ndarray:
    """Return masks 1 to 3 of each point in pixels, bool (P, 3, H, W), for a photograph uint8 (H, W, 3)."""
    height, width = pixels.shape[:2]
    device = next(student.parameters()).device
    prepared, (h, w) = student.preprocess.prepare(pixels)
    (embedding,) = embed(student, student.preprocess, prepared[None], torch.tensor([[h, w]]))
    xy = torch.from_numpy(xy_P2 * [w / width, h / height]).float().to(device)
    labels = torch.ones(len(xy), 1, dtype=torch.int, device=device)
    logits, _ = student.head.decode(embedding, xy[:, None], labels, multimask=True)
    masks = [(student.head.upsample(mask, (h, w), (height, width)) > 0).squeeze(1) for mask in logits.split(1, dim=1)]
    return torch.stack(masks, dim=1).cpu().numpy()


def _iou(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    return float((a_HW & b_HW).sum() / max((a_HW | b_HW).sum(), 1))
