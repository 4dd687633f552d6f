"""Run a teacher pass and some training steps on a few images, in a temporary folder, to measure them."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import fmdistill.cache as cache
from fmdistill.backbones.device import pick_device
from fmdistill.cache import manifest
from fmdistill.cache.batch import BatchReader, Data, Place
from fmdistill.cache.outputs import from_json
from fmdistill.cache.store import Folder
from fmdistill.cache.teacher_pass import Pass
from fmdistill.distill import tasks
from fmdistill.distill.train import Engine, fit
from fmdistill.images import DecodeError, Encoded, Images
from fmdistill.images import build as build_images
from fmdistill.launcher import processes
from fmdistill.logs import progress
from fmdistill.recipe import Recipe, merge, parse_overrides
from fmdistill.registry import UserError, convert, typed
from fmdistill.teachers.family import Teacher

MOST_IMAGES = 64  # of a split, if none of fewer images can be decoded
S = TypeVar("S")


@dataclass(frozen=True)
class MeasuredPass:
    """A measured teacher pass: the number of images, those without an output, and the seconds."""

    images: int
    failed: int
    seconds: float


@dataclass(frozen=True)
class RepeatedData:
    """Data repeated to at least `least` samples, so that a few images fill a batch."""

    data: Data
    least: int

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of samples of each shard, with repetitions."""
        return tuple(count * -(-self.least // sum(self.data.counts)) for count in self.data.counts)

    def item(self, epoch: int, shard: int, index: int) -> Mapping[str, Any]:
        """Return one sample."""
        return self.data.item(*self._place(epoch, shard, index))

    def read_batch(self, places: Sequence[Place]) -> Mapping[str, Any]:
        """Return the part of a batch that the data reads for all samples at once."""
        originals = [self._place(*place) for place in places]
        return self.data.read_batch(originals) if isinstance(self.data, BatchReader) else {}

    def _place(self, epoch: int, shard: int, index: int) -> Place:
        return epoch, shard, index % self.data.counts[shard]


def verb_settings(verb: str, kind: type[S], overrides: list[str]) -> tuple[S, list[str]]:
    """Convert the overrides `verb`.KEY=VALUE to a `kind`; return it and the other overrides, for the recipe."""
    own = [override for override in overrides if override.startswith(f"{verb}.")]
    arguments: Mapping[str, Any] = parse_overrides(own).get(verb, {})
    settings = kind(**typed(kind, arguments, verb))
    return settings, [override for override in overrides if override not in own]


def check_single_process(verb: str) -> None:
    """Raise a UserError if a launcher started several processes, which would disturb each other's measurements."""
    if processes()[1] > 1:
        raise UserError(f"{verb}: measures a single process; start it without torchrun or `accelerate launch`")


def with_few_images(recipe: Recipe, count: int, folder: Path) -> Recipe:
    """Return the recipe limited to `count` images of each split, with its cache and run in `folder`.

    If none of them can be decoded, the count is doubled: images without an output tell nothing about bytes and seconds.
    """
    limit = convert(recipe.images.get("limit"), int | None, "images.limit")
    while count < MOST_IMAGES and not _decodable(merge(recipe.images, {"limit": min(count, limit or count)})):
        count *= 2
    return dataclasses.replace(
        recipe,
        out=str(folder / "run"),
        images=merge(recipe.images, {"limit": min(count, limit or count)}),
        cache=recipe.cache and dataclasses.replace(recipe.cache, root=str(folder / "cache"), local=""),
    )


def _decodable(images: Mapping[str, Any]) -> bool:
    """Return whether each shard that the limit cuts contains an image that can be decoded."""
    few = build_images(images)
    return all(
        any(_decodes(few, image) for image in few.read(shard)) for shard in few.shards() if shard.take is not None
    )


def _decodes(images: Images, image: Encoded) -> bool:
    try:
        images.picture(image)
    except DecodeError:
        return False
    return True


def measure_teacher_pass(recipe: Recipe, model: Teacher) -> MeasuredPass:
    """Measure the teacher pass of a recipe from `with_few_images`, after a blank image that warms up the device."""
    assert recipe.cache is not None
    root, images = Path(recipe.cache.root), build_images(recipe.images)
    shards = images.shards()
    fields = manifest.claim(root, cache.identity(recipe, images, model))
    if (head := model.head()) is not None:
        head.save(root)
    total = sum(cache.estimate(images, shards).values())
    # The plan reports every image that fails, so max_failed is 1 and none of them stops the pass.
    work = Pass(model, images, Folder(root), manifest.identity_hash(fields), from_json(fields["outputs"]), 1.0, total)
    side = model.preprocess.image_size
    model(torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.full((1, 2), side))
    with progress(total=total, description="measuring the teacher", unit="image") as bar:
        start = time.perf_counter()
        work.run(shards, bar)
        seconds = time.perf_counter() - start
    return MeasuredPass(work.seen, work.failed, seconds)


def step_seconds(recipe: Recipe, steps: int) -> float:
    """Measure the mean seconds of `steps` training steps of a recipe from `with_few_images`, after a warm-up step."""
    engine, job, marks = Engine(recipe.train), tasks.build(recipe), []

    def mark(model: nn.Module) -> dict[str, float]:
        if engine.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return {}

    every = {"validate_every": 1, "checkpoint_every": steps + 1}  # the validation after each step reads the clock
    train = dataclasses.replace(recipe.train, steps=steps + 1, epochs=None, **every)
    if not sum(job.train.counts):
        raise UserError("images: none of the images measured can be trained on; set plan.images to more")
    data = RepeatedData(job.train, recipe.train.batch_size)
    fit(job.task, data, dataclasses.replace(recipe, train=train), mark, engine, job.shared, job.complete)
    return (marks[-1] - marks[0]) / steps


def device_name(setting: str, where: str) -> str:
    """Return the product name of a GPU, or "cpu" with the number of threads, for a device setting."""
    device = pick_device(setting, where)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' * (threads != 1)})"
