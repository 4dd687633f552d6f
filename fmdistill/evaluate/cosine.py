"""Score students of any family by their output's cosine similarity to the cached teacher's and its MSE.

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
from fmdistill.evaluate import text_side
from fmdistill.evaluate.annotated import DType
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.results import Judged, Metric
from fmdistill.evaluate.subjects import MEAN_OF, forward, in_turn, valid_tokens
from fmdistill.logs import progress
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, suggest
from fmdistill.teachers.compute import computing

FLOOR = "mean embedding"
COSINE = "Cosine: the similarity of the student's output to the teacher's, for maps token by token; 1 is the teacher."
MSE = "MSE: the mean squared difference between the student's output and the teacher's; 0 is the teacher."


@dataclass(frozen=True)
class TeacherSimilarity:
    """Cosine similarity and MSE of a student's `output` to the teacher's cached one, on the validation images.

    The cosine of a map is the mean over its valid tokens, those that hold any real pixel. The squared difference is
    averaged over the same tokens and all channels. Both are then averaged over images. `floor` adds the subject "mean
    embedding": the mean of the teacher's output over 512 training images; for maps, at each position over the images
    in which it is valid. `limit` takes only the first images, alternating between the groups of a mix.
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
        """Raise a UserError for settings that measure nothing."""
        text_side.check_reading(self.batch, self.workers, self.limit)

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError for a recipe without a cache."""
        if recipe.cache is None:
            raise UserError("cosine: compares the student with a cached teacher, and this recipe has no cache")

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module]) -> Judged:
        """Return rows over all images and each group of a mix; details have one entry per image and subject."""
        cache, device = open_cache(recipe), pick_device(self.device, "device")
        if self.output not in cache.shapes:
            raise UserError(f"output={self.output}: not in {cache.root}.{suggest(self.output, cache.shapes)}")
        students = {name: student.to(device).eval() for name, student in students.items()}
        floors = {FLOOR: mean_output(cache, self.output).to(device)} if self.floor else {}
        images: list[dict[str, Any]] = []
        for batch, groups in self._batches(cache, device):
            teacher_BX = batch["outputs"][f"{cache.family}.{self.output}"].float()
            outputs = {name: floor.expand_as(teacher_BX) for name, floor in floors.items()}
            image_B3SS = cache.preprocess.normalize(batch["pixels"], batch["sizes"])
            for name, student in students.items():
                with torch.inference_mode(), computing(self.dtype, device):
                    outputs[name] = forward(student, image_B3SS, self.output)[self.output].float()
                if outputs[name].shape != teacher_BX.shape:
                    raise UserError(
                        f"{name}: gives an {self.output} of {tuple(outputs[name].shape[1:])}, the cache holds "
                        f"{tuple(teacher_BX.shape[1:])}; evaluate it with the cache that it was trained on, or by knn"
                    )
            valid_Bgg = None
            if teacher_BX.dim() == 4:
                valid_Bgg = valid_tokens(cache.preprocess, batch["sizes"], teacher_BX)
            for name in (*students, *floors):
                cosine_B, mse_B = compare(outputs[name], teacher_BX, valid_Bgg)
                images += [
                    {"key": key, "group": group, "subject": name, "cosine": cosine, "mse": mse}
                    for key, group, cosine, mse in zip(
                        batch["keys"], groups, cosine_B.tolist(), mse_B.tolist(), strict=True
                    )
                ]
        means = _means(images, (*students, *floors))
        return means.rows(), {"images": images, **means.details(keys=False)}

    def _batches(self, cache: Cache, device: torch.device) -> Iterator[tuple[Batch, list[str]]]:
        """Yield batches of validation images with the teacher's outputs, on the device, and each image's group."""
        data = CachedImages(cache, "validation")
        places = [(0, shard, index) for shard, index in in_turn(data)][: self.limit]
        if not places:
            raise UserError("cosine: no images to evaluate; the cache's validation split is empty")
        chosen = [places[start : start + self.batch] for start in range(0, len(places), self.batch)]
        loaded = progress(batches(data, chosen, self.workers), "cosine", total=len(chosen), unit="batch")
        for batch, batch_places in zip(stop.between(loaded), chosen, strict=True):
            yield data.decode(to_device(batch, device)), [data.shards[shard].group for _, shard, _ in batch_places]


def compare(a_BX: Tensor, b_BX: Tensor, valid_Bgg: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each image's cosine similarity and mean squared difference, (B,) each; for maps over the valid tokens."""
    cosine_BX = F.cosine_similarity(a_BX, b_BX, dim=1)
    square_BX = (a_BX - b_BX).square().mean(1)
    if valid_Bgg is None:
        return cosine_BX, square_BX
    count_B = valid_Bgg.sum((1, 2))
    return (cosine_BX * valid_Bgg).sum((1, 2)) / count_B, (square_BX * valid_Bgg).sum((1, 2)) / count_B


def mean_output(cache: Cache, output: str) -> Tensor:
    """Return the teacher's mean output, (C,) or (C, g, g), over the first 512 training images of alternating groups.

    A position of a map that is valid in no image has the mean over all valid tokens. Raises UserError if the cache has
    no training images.
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
        raise UserError(f"floor=true: {cache.root} holds no training images; set floor=false")
    if not shape[1:]:
        return total / count
    return torch.where(count > 0, total / count.clamp_min(1), (total.sum((1, 2)) / count.sum())[:, None, None])


def _means(images: list[dict[str, Any]], subjects: tuple[str, ...]) -> Means:
    groups = list(dict.fromkeys(image["group"] for image in images))
    means = Means()
    for name in subjects:
        for group in (None, *(groups if len(groups) > 1 else ())):
            members = [image for image in images if image["subject"] == name and group in (None, image["group"])]
            for metric in ("cosine", "mse"):
                values = [image[metric] for image in members]
                means.add_each([image["key"] for image in members], name, metric, values, group=group)
    return means
