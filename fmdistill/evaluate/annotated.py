"""Read images with their labels and captions, and embed them by students and by a cached teacher.

Letters: B images of a batch, N images in all, D the shared embedding's width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmdistill import stop
from fmdistill.cache.batch import Place, StoredOutputs, annotation, sample, to_device
from fmdistill.cache.dataset import CachedImages
from fmdistill.cache.prepare import must_prepare
from fmdistill.distill.data import SplitImages, every
from fmdistill.distill.loader import batches
from fmdistill.evaluate.results import TEACHER
from fmdistill.evaluate.subjects import forward, pooled
from fmdistill.images import Encoded, Images, captions
from fmdistill.logs import progress
from fmdistill.registry import UserError
from fmdistill.teachers.compute import computing
from fmdistill.teachers.family import Preprocess, Teacher

DType = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Annotated:
    """One split's images, from a source or from a cache together with the teacher's outputs."""

    images: Images
    preprocess: Preprocess
    cached: CachedImages | None = None
    pixels: bool = True  # False if only the teacher's embeddings are needed
    captioned: bool = False  # whether to read captions
    split: str = "validation"
    output: str = "embedding"  # the output of teacher and students that is compared
    pooled: bool = False  # whether maps are averaged over their valid tokens; if not, they are an error

    @cached_property
    def split_images(self) -> CachedImages | SplitImages:
        """The images by numbers of shard and image."""
        return SplitImages(self.images, self.split) if self.cached is None else self.cached

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of images of each shard."""
        return self.split_images.counts

    def item(self, epoch: int, shard: int, index: int) -> dict[str, Any]:
        """Return one image with its label and "captions", a list of texts; without pixels if they are not needed."""
        name, encoded = self.split_images.shards[shard].name, self.split_images.encoded(shard, index)
        texts = captions(name, encoded) if self.captioned else []
        if not self.pixels:
            return {**annotation(encoded.key, name, encoded.label), "captions": texts}
        return {**sample(must_prepare(self.images, self.preprocess, encoded, name)), "captions": texts}

    def read_batch(self, places: Sequence[Place]) -> Mapping[str, StoredOutputs]:
        """Return the teacher's outputs as they are stored, if the images come from a cache."""
        return {} if self.cached is None else self.cached.read_batch(places)


def first_image(images: Images, protocol: str, split: str = "validation") -> Encoded:
    """Return the first image of the split; UserError that names the `protocol` if the split is empty."""
    for shard in images.shards():
        if shard.split == split and (keys := images.source.keys(shard.name)):
            return images.source.fetch(shard.name, keys[0])
    raise _no_images(protocol, split)


def _no_images(protocol: str, split: str) -> UserError:
    kind = "training" if split == "train" else split
    return UserError(f"{protocol}: there are no {kind} images; name some by the protocol's or the recipe's `images`")


@dataclass(frozen=True)
class Embedded:
    """Images with their embeddings by subject: float32 (N, D) on the CPU, not normalised; a label is -1 for none."""

    keys: list[str]
    labels: list[int]
    captions: list[list[str]]
    embeddings: dict[str, Tensor]


def embed(
    data: Annotated,
    models: Mapping[str, nn.Module],
    device: torch.device,
    title: str,
    batch: int = 64,
    workers: int = 0,
    limit: int | None = None,
    dtype: DType = "fp32",
    teacher: Teacher | None = None,
) -> Embedded:
    """Embed the first `limit` images by every model and by the teacher: from a cache, or by `teacher`, if given."""
    total = min(sum(data.counts), limit or sum(data.counts))
    if total == 0:
        raise _no_images(title, data.split)
    models = {name: model.to(device).eval() for name, model in models.items()}
    embedded = Embedded([], [], [], {})
    parts: dict[str, list[Tensor]] = {name: [] for name in [*models, *([TEACHER] if data.cached or teacher else [])]}
    places = list(islice((place for (place,) in every(data, 1)), total))
    groups = [places[start : start + batch] for start in range(0, total, batch)]
    with progress(total=total, description=title, unit="image") as bar:
        for loaded in stop.between(batches(data, groups, workers)):
            images: Any = to_device(loaded, device)
            embedded.keys.extend(images["keys"])
            embedded.labels.extend(images["label_values"])
            embedded.captions.extend(images["captions"])
            if data.cached:
                output_BX = data.cached.decode(images)["outputs"][f"{data.cached.cache.family}.{data.output}"]
                vectors_BD = pooled(output_BX, data.preprocess, images["sizes"]) if data.pooled else output_BX
                parts[TEACHER].append(vectors_BD.cpu())
            elif teacher is not None:
                parts[TEACHER].append(teacher(images["pixels"], images["sizes"])[data.output])
            if models:
                image_B3SS = data.preprocess.normalize(images["pixels"], images["sizes"])
                for name, model in models.items():
                    parts[name].append(_vectors(model, image_B3SS, images["sizes"], data, dtype))
            bar.update(len(images["keys"]))
    embedded.embeddings.update({name: torch.cat(vectors) for name, vectors in parts.items()})
    return embedded


@torch.inference_mode()
def _vectors(model: nn.Module, image: Tensor, sizes: Tensor, data: Annotated, dtype: DType) -> Tensor:
    with computing(dtype, image.device):
        embedding = forward(model, image, data.output)[data.output].float()
    if data.pooled:
        return pooled(embedding, data.preprocess, sizes).cpu()
    if embedding.ndim != 2:
        raise UserError(
            f"{type(model).__name__}: gives an embedding of {tuple(embedding.shape[1:])} for an image; this protocol "
            f"compares vectors with texts, so judge a student of CLIP"
        )
    return embedding.cpu()
