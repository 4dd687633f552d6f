"""Average precision and recall from faster-coco-eval: the figures of pycocotools, accumulated in C++."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fmdistill.evaluate.matching import Annotation, Rules
from fmdistill.evaluate.precision import PrecisionTable, named
from fmdistill.registry import UserError

PACKAGE = "faster-coco-eval"


def check_installed() -> None:
    """Raise a UserError if the package is missing."""
    try:
        import faster_coco_eval  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"scorer=faster_coco_eval: {PACKAGE} is missing; pip install 'fmdistill[ap]', or use scorer=pycocotools"
        ) from error


@dataclass
class FasterPrecision:
    """AP and AR of images that are added one by one; all masks are stored until `figures`, and nothing is resampled."""

    rules: Rules
    frequencies: Mapping[int, str] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    objects: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, objects: Iterable[Annotation], detections: Iterable[Annotation], unfinished: Collection[int] = ()
    ) -> None:
        """Add an image, as for `matching.match`. Add images by ascending id: it decides between equal scores."""
        number = len(self.images) + 1
        objects, detections = list(objects), list(detections)
        size = next((one["segmentation"]["size"] for one in [*objects, *detections]), [1, 1])
        absent = {one["category_id"] for one in detections} - {one["category_id"] for one in objects}
        lists = {
            "neg_category_ids": sorted(absent),
            "not_exhaustive_category_ids": list(unfinished) if self.rules.classes else [],
        }
        self.images.append({"id": number, "height": size[0], "width": size[1], **lists})
        for one in objects:
            crowd = {"iscrowd": 0 if self.rules.federated else int(one.get("iscrowd", 0))}
            self.objects.append({**one, **crowd, "image_id": number, "id": len(self.objects) + 1})
        self.detections += [{**one, "image_id": number} for one in detections]

    def figures(self) -> dict[str, float]:
        """Return AP, AP50, AR and so on by name, from 0 to 1; NaN for those that have no objects."""
        from faster_coco_eval import COCO, COCOeval_faster  # type: ignore[import-not-found]

        categories = sorted({one["category_id"] for one in [*self.objects, *self.detections]})
        truth = COCO()
        truth.dataset = {
            "images": self.images,
            "annotations": self.objects,
            "categories": [{"id": c, "name": str(c), "frequency": self.frequencies.get(c, "f")} for c in categories],
        }
        truth.createIndex()
        kind = "segm" if self.rules.boundary is None else "boundary"
        ratio = {} if self.rules.boundary is None else {"boundary_dilation_ratio": self.rules.boundary}
        detected = truth.loadRes(self.detections) if self.detections else COCO()
        evaluation = COCOeval_faster(truth, detected, kind, lvis_style=self.rules.federated, **ratio)
        evaluation.params.maxDets = list(self.rules.limits)
        evaluation.params.useCats = int(self.rules.classes)
        evaluation.evaluate()
        evaluation.accumulate()
        precision_TRKAL, recall_TKAL = (np.asarray(evaluation.eval[name]) for name in ("precision", "recall"))
        precision_KTA = precision_TRKAL[..., -1].mean(1).transpose(1, 0, 2)
        recall_KTAL = recall_TKAL.transpose(1, 0, 2, 3)
        table = PrecisionTable(
            np.where(precision_KTA < 0, np.nan, precision_KTA), np.where(recall_KTAL < 0, np.nan, recall_KTAL)
        )
        groups = [self.frequencies.get(c, "") for c in categories]
        return {name: float(value) for name, value in named(table, groups, self.rules)}
