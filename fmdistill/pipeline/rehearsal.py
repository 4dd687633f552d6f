"""A handful of images through teacher, cache and training steps, in a folder of their own that goes away afterwards."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fmdistill import cache
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

LOOKED = 64  # images of a split among which a handful looks for one that can be decoded
S = TypeVar("S")


@dataclass(frozen=True)
class Taught:
    """What a teacher pass over a handful of images was: its images, those without an output, and its seconds."""

    images: int
    failed: int
    seconds: float


@dataclass(frozen=True)
class Repeated:
    """Data repeated until they fill a batch, so that a handful is enough to train on for a few steps."""

    data: Data
    least: int

    @property
    def counts(self) -> tuple[int, ...]:
        """The samples of each shard, repetitions counted."""
        return tuple(count * -(-self.least // sum(self.data.counts)) for count in self.data.counts)

    def item(self, epoch: int, shard: int, index: int) -> Mapping[str, Any]:
        """Return one sample."""
        return self.data.item(*self._place(epoch, shard, index))

    def read_batch(self, places: Sequence[Place]) -> Mapping[str, Any]:
        """Return what the data reads of a whole batch at once."""
        once = [self._place(*place) for place in places]
        return self.data.read_batch(once) if isinstance(self.data, BatchReader) else {}

    def _place(self, epoch: int, shard: int, index: int) -> Place:
        return epoch, shard, index % self.data.counts[shard]


def verb_settings(verb: str, kind: type[S], overrides: list[str]) -> tuple[S, list[str]]:
    """Return the settings `verb`.KEY=VALUE as a `kind`, and the other overrides, which are the recipe's."""
    own = [one for one in overrides if one.startswith(f"{verb}.")]
    given: Mapping[str, Any] = parse_overrides(own).get(verb, {})
    made = kind(**typed(kind, given, verb))
    return made, [one for one in overrides if one not in own]


def alone(verb: str) -> None:
    """Raise a UserError where a launcher started several processes, which would disturb each other's measurement."""
    if processes()[1] > 1:
        raise UserError(f"{verb}: measures one process; start it without torchrun or `accelerate launch`")


def on_handful(recipe: Recipe, count: int, folder: Path) -> Recipe:
    """Return the recipe cut to `count` images of each split, its cache and run in `folder`.

    If none of those can be decoded there are more, since what gives no output tells nothing of bytes and seconds.
    """
    limit = convert(recipe.images.get("limit"), int | None, "images.limit")
    while count < LOOKED and not _decodable(merge(recipe.images, {"limit": min(count, limit or count)})):
        count *= 2
    return dataclasses.replace(
        recipe,
        out=str(folder / "run"),
        images=merge(recipe.images, {"limit": min(count, limit or count)}),
        cache=recipe.cache and dataclasses.replace(recipe.cache, root=str(folder / "cache"), local=""),
    )


def _decodable(images: Mapping[str, Any]) -> bool:
    """Return whether each shard that the limit cuts holds an image that can be decoded."""
    made = build_images(images)
    return all(
        any(_decodes(made, image) for image in made.read(shard)) for shard in made.shards() if shard.take is not None
    )


def _decodes(images: Images, image: Encoded) -> bool:
    try:
        images.picture(image)
    except DecodeError:
        return False
    return True


def teach(recipe: Recipe, model: Teacher) -> Taught:
    """Run the teacher pass of a recipe that `on_handful` made, after one blank image that warms up the device."""
    assert recipe.cache is not None
    root, images = Path(recipe.cache.root), build_images(recipe.images)
    shards = images.shards()
    found = manifest.claim(root, cache.identity(recipe, images, model))
    if (head := model.head()) is not None:
        head.save(root)
    total = sum(cache.estimate(images, shards).values())
    # Whoever plans wants to know of every image that fails, so none of them stops the pass.
    work = Pass(model, images, Folder(root), manifest.identity_hash(found), from_json(found["outputs"]), 1.0, total)
    side = model.preprocess.image_size
    model(torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.full((1, 2), side))
    with progress(total=total, description="measuring the teacher", unit="image") as bar:
        start = time.perf_counter()
        work.run(shards, bar)
        seconds = time.perf_counter() - start
    return Taught(work.seen, work.failed, seconds)


def step_seconds(recipe: Recipe, steps: int) -> float:
    """Return the mean seconds of `steps` training steps of a recipe that `on_handful` made, after one that warms up."""
    engine, job, marks = Engine(recipe.train), tasks.build(recipe), []

    def mark(model: nn.Module) -> dict[str, float]:
        if engine.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return {}

    every = {"validate_every": 1, "checkpoint_every": steps + 1}  # "validation" after each step is the clock
    train = dataclasses.replace(recipe.train, steps=steps + 1, epochs=None, **every)
    if not sum(job.train.counts):
        raise UserError("images: none of the handful can be trained on; give more of them")
    data = Repeated(job.train, recipe.train.batch_size)
    fit(job.task, data, dataclasses.replace(recipe, train=train), mark, engine, job.shared, job.complete)
    return (marks[-1] - marks[0]) / steps


def device_name(setting: str, where: str) -> str:
    """Return the device called `setting` as people call it, a CPU with its threads."""
    device = pick_device(setting, where)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' * (threads != 1)})"
