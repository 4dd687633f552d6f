"""Give evaluators each validation image as seen by every subject: embeddings and heads of students and their teacher.

Letters: P prompts, K points of a prompt, M masks of a prompt (1 or 3), C channels, g tokens a side, n = 4 g,
H x W original pixels, h x w resized pixels (before padding to SAM's square input).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from functools import partial as bound
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fmdistill import stop, teachers
from fmdistill.backbones.device import pick_device
from fmdistill.backbones.fast_decoder import Decode, image_decoder
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import SamPreprocess
from fmdistill.cache import Cache, open_cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.cache.prepare import PreparedImage, must_prepare
from fmdistill.cache.reader import ShardReader
from fmdistill.distill.data import SplitImages
from fmdistill.distill.student import STUDENTS, own_head
from fmdistill.evaluate.results import TEACHER
from fmdistill.evaluate.segmentation import Size
from fmdistill.evaluate.stored_results import Partial
from fmdistill.evaluate.subjects import alternating, embed
from fmdistill.images import Encoded, Images
from fmdistill.images import build as build_images
from fmdistill.logs import log, progress
from fmdistill.predict.heads import teacher_side
from fmdistill.predict.sam import WholeSam
from fmdistill.recipe import Component, Recipe
from fmdistill.registry import UserError
from fmdistill.teachers.family import Preprocess


@dataclass(frozen=True)
class Segmenter:
    """A subject: its head on the device, its images' preprocessing, and its network, None for a cached teacher."""

    head: PromptHead
    preprocess: Preprocess
    network: Callable[[Tensor, Tensor], Tensor] | None  # (pixels (1, 3, S, S), sizes (1, 2)) -> float32 (1, C, g, g)


@dataclass(frozen=True)
class ImageSegmenter:
    """A subject ready to answer prompts on one image; sizes are (H, W) and (h, w)."""

    head: PromptHead
    embedding: Tensor  # float32 (C, g, g)
    original: Size
    resized: Size

    @cached_property
    def decoder(self) -> Decode:
        """The decoder of prompts in resized pixels, the factorised one if the head is SAM's."""
        with torch.inference_mode():
            return image_decoder(self.head, self.embedding)

    @torch.inference_mode()
    def decode(
        self,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        boxes: ArrayLike | None = None,
        masks: Tensor | None = None,
        multimask: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return logits (P, M, n, n) and predicted IoU (P, M) of prompts in pixels of the original image.

        `points` (P, K, 2) are xy, `labels` (P, K) as for `PromptHead.decode`, `boxes` (P, 4) xyxy, `masks`
        (P, 1, n, n) logits of an earlier answer.
        """
        device = self.embedding.device
        boxes_P4 = None if boxes is None else self._scaled(np.reshape(boxes, (-1, 2, 2))).flatten(1)
        points_PK2 = None if points is None else self._scaled(points)
        labels_PK = None if labels is None else torch.as_tensor(np.asarray(labels), dtype=torch.int, device=device)
        return self.decoder(points_PK2, labels_PK, boxes_P4, masks, multimask=multimask)

    @torch.inference_mode()
    def upsample(self, logits: Tensor) -> Tensor:
        """Return logits (P, M, n, n) at the original size, (P, M, H, W), by SAM's path."""
        return self.head.upsample(logits, self.resized, self.original)

    def _scaled(self, xy: ArrayLike) -> Tensor:
        """Return xy of the original image in resized pixels, float32, rounded once as in segment_anything."""
        scale = [self.resized[1] / self.original[1], self.resized[0] / self.original[0]]
        return torch.from_numpy((np.asarray(xy, float) * scale).astype(np.float32)).to(self.embedding.device)


@dataclass(frozen=True)
class SegmentedImage:
    """One validation image and its subjects by name; `original` is the (H, W) of the decoded image."""

    key: str
    shard: str
    group: str
    encoded: Encoded  # as its source stores it, with the other columns
    original: Size
    segmenters: Mapping[str, ImageSegmenter]

    @property
    def name(self) -> str:
        """Return SHARD/KEY, since images of different shards may have the same key."""
        return f"{self.shard}/{self.key}"


@dataclass(frozen=True)
class Segmenters:
    """The subjects of an evaluation by name, and its images."""

    subjects: Mapping[str, Segmenter]
    data: CachedImages | SplitImages
    places: Mapping[str, tuple[int, int]] = field(repr=False)  # shard and index by the image's name, SHARD/KEY

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        students: Mapping[str, nn.Module],
        images: Component | None = None,
        teacher: bool = False,
        device: str = "auto",
    ) -> "Segmenters":
        """Return the students, and their teacher, with the recipe's validation images or those of `images`.

        A source without validation images is taken whole. The teacher is the recipe's cache, exact, if the images are
        the cache's; else it runs if `teacher` is true, or is left out. Students use the teacher's head, or their own
        (`head_of`). Raises UserError if cache or head are missing.
        """
        target, heads = pick_device(device, "device"), {n: head_of(model, recipe) for n, model in students.items()}
        all_own = None not in heads.values()
        cache = _cache(recipe, optional=teacher or all_own) if images is None else None
        live = teachers.build(recipe.teacher) if teacher and cache is None and recipe.teacher is not None else None
        head, preprocess = _shared(recipe, cache, live, all_own)
        subjects = {}
        if head is not None and (cache is not None or live is not None):
            network = None if live is None else bound(_embed_live, live)
            subjects[TEACHER] = Segmenter(head.to(target).eval(), preprocess, network)
        for name, model in students.items():
            used = heads[name] or head
            assert used is not None
            # a head that was trained with its student is for images prepared as its teacher's are
            of_teacher = preprocess is not None and (heads[name] is None or own_head(model) is not None)
            prepares: Any = preprocess if of_teacher else _own_preprocess(used)
            subjects[name] = Segmenter(used.to(target).eval(), prepares, bound(embed, model.to(target), prepares))
        data = CachedImages(cache, "validation") if cache is not None else _whole(images or recipe.images)
        return cls(subjects, data, dict(_named(data)))

    @property
    def names(self) -> list[str]:
        """The names of the images, SHARD/KEY, the groups of a mix in turn."""
        return list(self.places)

    def images(self, names: Sequence[str] | None = None) -> Iterator[SegmentedImage]:
        """Yield the images called `names`, by default all, in that order."""
        for name in self.names if names is None else names:
            yield self._image(*self.places[name])

    def judge_each(
        self, title: str, names: Sequence[str], judge: Callable[[SegmentedImage], Any], partial: Partial | None
    ) -> dict[str, Any]:
        """Return what `judge` finds out about each of the images `names`, with a progress bar called `title`.

        It is added to `partial` after each image, and images that `partial` already has are skipped.
        """
        judged = {} if partial is None else {name: partial.done[name] for name in names if name in partial.done}
        if judged:
            log.info("%s: %d of %d images were judged before the last stop", title, len(judged), len(names))
        remaining = self.images([name for name in names if name not in judged])
        for image in stop.between(progress(remaining, title, total=len(names), initial=len(judged), unit="image")):
            judged[image.name] = judge(image)
            if partial is not None:
                partial.add(image.name, judged[image.name])
        return judged

    def _image(self, shard: int, index: int) -> SegmentedImage:
        data = self.data
        encoded, source = data.encoded(shard, index), data.shards[shard].name
        prepared: dict[Preprocess, PreparedImage] = {}
        segmenters = {}
        for name, subject in self.subjects.items():
            if subject.preprocess not in prepared:
                prepared[subject.preprocess] = must_prepare(_source(data), subject.preprocess, encoded, source)
            image, device = prepared[subject.preprocess], next(subject.head.parameters()).device
            if subject.network is not None:
                embedding = subject.network(image.pixels[None], torch.tensor([image.size]))[0].to(device)
            else:
                assert isinstance(data, CachedImages)
                embedding = data.outputs([(shard, index)])["embedding"][0].to(device)
            _check_shape(name, embedding, subject.head)
            segmenters[name] = ImageSegmenter(subject.head, embedding, image.original, image.size)
        original = next(iter(prepared.values())).original
        return SegmentedImage(encoded.key, source, _source(data).group(source), encoded, original, segmenters)


def head_of(student: Any, recipe: Recipe) -> PromptHead | None:
    """Return the head that decodes a student's embeddings if it is not the teacher's, else None.

    It was trained with the student, or the student is a `WholeSam` or was trained without a teacher.
    """
    if (trained := own_head(student)) is not None:
        return trained
    own = isinstance(student, WholeSam) or (recipe.teacher is None and recipe.cache is None)
    head = getattr(student, "head", None)
    return head if own and isinstance(head, PromptHead) else None


def check(evaluator: str, recipe: Recipe, teacher: bool = False) -> None:
    """Raise a UserError for a recipe whose run makes no masks, and if `teacher` is true but the recipe has none."""
    student = recipe.student.get("name")
    if recipe.teacher is not None and not teachers.may_belong_to(recipe.teacher, "sam"):
        raise UserError(f"{evaluator}: judges the masks of SAMs; teacher.name={recipe.teacher.get('name')} is none")
    if recipe.teacher is None and student in STUDENTS and student != "sam_mini":
        raise UserError(f"{evaluator}: judges promptable models; student.name={student} without a teacher is none")
    if teacher and recipe.teacher is None:
        raise UserError("teacher=true: this recipe has no teacher; leave it out")


def _own_preprocess(head: PromptHead) -> SamPreprocess:
    side = head.config["image_size"]
    return SamPreprocess(side, side // head.config["image_embedding_size"])


def _cache(recipe: Recipe, optional: bool) -> Cache | None:
    """Return the recipe's finished cache; None if it has none, or if it is `optional` and cannot be read."""
    if recipe.cache is None:
        return None
    try:
        cache = open_cache(recipe)
        assert cache.shards is not None  # opens them
    except UserError as error:
        if not optional:
            raise
        log.info("evaluated without the cache, and so without its teacher: %s", error)
        return None
    if cache.family != "sam":
        raise UserError(f"{cache.root}: its teacher is of the family '{cache.family}' and makes no masks")
    return cache


def _shared(recipe: Recipe, cache: Cache | None, live: Any, all_own: bool) -> tuple[PromptHead | None, Any]:
    """Return the teacher's head and preprocessing; none if every student has its own and no teacher is at hand."""
    if cache is not None:
        return cache.head(), cache.preprocess
    if live is not None:
        head, preprocess = live.head(), live.preprocess
    elif all_own:
        return None, None
    else:
        head, preprocess = teacher_side(recipe, recipe.out)
    if not isinstance(head, PromptHead):
        raise UserError(f"{recipe.out}: its teacher has no mask decoder; evaluate a student of a SAM")
    return head, preprocess


def _embed_live(teacher: Any, pixels: Tensor, sizes: Tensor) -> Tensor:
    return teacher(pixels, sizes)["embedding"]


def _whole(settings: Component) -> SplitImages:
    """Return the validation images of a source, or all if it has none."""
    images = build_images(settings)
    splits = {shard.split for shard in images.shards()}
    return SplitImages(images, "validation" if "validation" in splits else "train")


def _source(data: CachedImages | SplitImages) -> Images:
    return data.cache.images if isinstance(data, CachedImages) else data.images


def _named(data: CachedImages | SplitImages) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the name and the place of each image, the groups of a mix in turn."""
    groups: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    for number, (shard, count) in enumerate(zip(data.shards, data.counts, strict=True)):
        keys = shard.keys if isinstance(shard, ShardReader) else _source(data).source.keys(shard.name)[:count]
        group = groups.setdefault(_source(data).group(shard.name), [])
        group.extend((f"{shard.name}/{key}", (number, index)) for index, key in enumerate(keys))
    return alternating(groups.values())


def _check_shape(name: str, embedding: Tensor, head: PromptHead) -> None:
    grid = head.config["image_embedding_size"]
    if tuple(embedding.shape) != (head.config["embed_dim"], grid, grid):
        raise UserError(
            f"{name}: gives an embedding of {tuple(embedding.shape)}, but its head takes "
            f"{(head.config['embed_dim'], grid, grid)}; judge it with the teacher that it learned from"
        )
