"""Score students of any family by how near their output is to the cached teacher's: cosine similarity and MSE.

Letters: B images of a batch, C channels or a vector's width, g tokens a side.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill import stop
from fmdistill.backbones.device import pick_device
from fmdistill.cache import Cache, open_cache
from fmdistill.cache.batch import Batch, to_device
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill.loader import batches
from fmdistill.evaluate import results, text_side
from fmdistill.evaluate.annotated import DType
from fmdistill.evaluate.results import Judged, Metric, Row
from fmdistill.evaluate.subjects import MEAN_OF, forward, in_turn, valid_tokens
from fmdistill.logs import progress
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, suggest
from fmdistill.teachers.compute import computing

FLOOR = "mean embedding"
COSINE = "Cosine: the similarity of the student's output to the teacher's, of maps token by token; 1 is the teacher."
MSE = "MSE: the mean squared difference of the student's output to the teacher's; 0 is the teacher."


@dataclass(frozen=True)
class Cosine:
    """Judge a student's `output` against the teacher's of that name in the cache, on the validation images.

    A vector has one cosine; a map has the mean over its valid tokens, those that hold any real pixel. The squared
    difference is averaged over the same tokens and all channels. Both are then averaged over images. `floor` adds the
    subject "mean embedding": the mean of the teacher's output over 512 training images, of maps at each position over
    the images in which it is valid. `limit` takes the first images, the groups of a mix in turn.
    """

    output: str = "embedding"
    floor: bool = True
    limit: int | None = None
    batch: int = 64
    workers: int = 2
    device: str = "auto"
    dtype: DType = "fp32"

    metrics: ClassVar[Mapping[str, Metric]] = {
        "cosine": Metric("cosine", better="higher", end=1.0, help=COSINE),
        "mse": Metric("MSE", better="lower", end=0.0, help=MSE),
    }

    def __post_init__(self) -> None:
        """Refuse what would measure nothing."""
        text_side.check_reading(self.batch, self.workers, self.limit)

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a recipe without a cache."""
        if recipe.cache is None:
            raise UserError("cosine: compares with a cached teacher, and this recipe has no cache")

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module]) -> Judged:
        """Return rows over all images and over each group of a mix, and details {"images": one per image, subject}."""
        cache, device = open_cache(recipe), pick_device(self.device, "device")
        if self.output not in cache.shapes:
            raise UserError(f"output={self.output}: {cache.root} holds none.{suggest(self.output, cache.shapes)}")
        students = {name: student.to(device).eval() for name, student in students.items()}
        floors = {FLOOR: mean_output(cache, self.output).to(device)} if self.floor else {}
        images: list[dict[str, Any]] = []
        for batch, groups in self._batches(cache, device):
            teacher_BX = batch["outputs"][f"{cache.family}.{self.output}"].float()
            made = {name: floor.expand_as(teacher_BX) for name, floor in floors.items()}
            image_B3SS = cache.preprocess.normalize(batch["pixels"], batch["sizes"])
            for name, student in students.items():
                with torch.inference_mode(), computing(self.dtype, device):
                    made[name] = forward(student, image_B3SS, self.output)[self.output].float()
                if made[name].shape != teacher_BX.shape:
                    raise UserError(
                        f"{name}: gives an {self.output} of {tuple(made[name].shape[1:])}, the cache holds "
                        f"{tuple(teacher_BX.shape[1:])}; judge it by the cache that it learned from, or by knn"
                    )
            valid_Bgg = None
            if teacher_BX.dim() == 4:
                valid_Bgg = valid_tokens(cache.preprocess, batch["sizes"], teacher_BX)
            for name in (*students, *floors):
                cosine_B, mse_B = compare(made[name], teacher_BX, valid_Bgg)
                images += [
                    {"key": key, "group": group, "subject": name, "cosine": cosine, "mse": mse}
                    for key, group, cosine, mse in zip(
                        batch["keys"], groups, cosine_B.tolist(), mse_B.tolist(), strict=True
                    )
                ]
        return _rows(images, (*students, *floors)), {"images": images}

    def _batches(self, cache: Cache, device: torch.device) -> Iterator[tuple[Batch, list[str]]]:
        """Yield the validation images with the teacher's outputs, on the device, and the groups of the images."""
        data = CachedImages(cache, "validation")
        places = [(0, shard, index) for shard, index in in_turn(data)][: self.limit]
        if not places:
            raise UserError("cosine: no images to evaluate; the cache's validation split is empty")
        chosen = [places[start : start + self.batch] for start in range(0, len(places), self.batch)]
        loaded = progress(batches(data, chosen, self.workers), "cosine", total=len(chosen), unit="batch")
        for batch, own in zip(stop.between(loaded), chosen, strict=True):
            yield data.decode(to_device(batch, device)), [data.shards[shard].group for _, shard, _ in own]


def compare(a_BX: Tensor, b_BX: Tensor, valid_Bgg: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each image's cosine similarity and mean squared difference (B,), of maps over their valid tokens."""
    cosine_BX = F.cosine_similarity(a_BX, b_BX, dim=1)
    square_BX = (a_BX - b_BX).square().mean(1)
    if valid_Bgg is None:
        return cosine_BX, square_BX
    count_B = valid_Bgg.sum((1, 2))
    return (cosine_BX * valid_Bgg).sum((1, 2)) / count_B, (square_BX * valid_Bgg).sum((1, 2)) / count_B


def mean_output(cache: Cache, output: str) -> Tensor:
    """Return the teacher's mean output over the first training images, every group in turn: (C,) or (C, g, g).

    A position of a map that is valid in none of them has the mean over all valid tokens.
    """
    data = CachedImages(cache, "train")
    shape = cache.shapes[output]
    total, count = torch.zeros(shape), torch.zeros(shape[1:])
    for shard, index in in_turn(data)[:MEAN_OF]:
        reader = data.shards[shard]
        value = data.outputs([(shard, index)])[output][0]
        valid = torch.ones(())
        if value.dim() == 3:
            valid = valid_tokens(cache.preprocess, torch.tensor([reader.samples[index]["resized"]]), value[None])[0]
        total += value * valid
        count += valid
    if not count.any():
        raise UserError(f"floor=true: {cache.root} holds no training images; judge with floor=false")
    if not shape[1:]:
        return total / count
    return torch.where(count > 0, total / count.clamp_min(1), (total.sum((1, 2)) / count.sum())[:, None, None])


def _rows(images: list[dict[str, Any]], subjects: tuple[str, ...]) -> list[Row]:
    groups = list(dict.fromkeys(image["group"] for image in images))
    rows = []
    for name in subjects:
        for group in (None, *(groups if len(groups) > 1 else ())):
            own = [image for image in images if image["subject"] == name and group in (None, image["group"])]
            for metric in ("cosine", "mse"):
                mean = sum(image[metric] for image in own) / len(own)
                rows.append(results.row(name, metric, mean, len(own), group=group))
    return rows
