"""Measure training steps from a cache, and the same steps fed by a plain DataLoader that reads .npy files."""

import dataclasses
import gc
import itertools
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fmdistill.backbones.device import cores
from fmdistill.cache.batch import Batch, collate, fill
from fmdistill.distill import tasks
from fmdistill.distill.job import Job
from fmdistill.distill.loader import batches
from fmdistill.distill.optim import OPTIMIZERS
from fmdistill.distill.train import Engine, step_batches
from fmdistill.images import Images
from fmdistill.images import build as build_images
from fmdistill.pipeline.measurement import Measurement
from fmdistill.pipeline.rehearsal import RepeatedData, measure_teacher_pass, with_few_images
from fmdistill.recipe import Recipe
from fmdistill.registry import bind
from fmdistill.teachers.family import Preprocess, Teacher

PLAIN = "DataLoader of .npy files"


@dataclass(frozen=True)
class TrainingSpeed:
    """What the steps took: seconds in all, those spent waiting for a batch, and bytes of memory above the start."""

    seconds: float
    waiting: float
    memory: int


class NpyFiles(Dataset):
    """Images with one .npy file for each output, as a plain training script stores them."""

    def __init__(self, images: Images, preprocess: Preprocess, files: Sequence[dict[str, Any]], length: int) -> None:
        self.images, self.preprocess, self.files, self.length = images, preprocess, files, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one image as a sample of a batch; `index` counts through the images again and again."""
        stored = self.files[index % len(self.files)]
        encoded = self.images.source.fetch(stored["shard"], stored["key"])
        pixels, size = self.preprocess.prepare(self.images.picture(encoded).pixels)
        outputs = {name: torch.from_numpy(np.load(path)) for name, path in stored["outputs"].items()}
        return {**stored["sample"], "pixels": pixels, "sizes": torch.tensor(size), "outputs": outputs}


def measure_training(recipe: Recipe, model: Teacher, folder: Path, images: int, steps: int) -> list[Measurement]:
    """Train `steps` steps on `images` repeated images from a cache in `folder`, and the same from .npy files there.

    Both decode every image at every step (`train.image_memory` is 0) in `train.workers` processes, and both are warm:
    a step precedes those measured, during which each worker loads up to two batches more.
    """
    small = with_few_images(recipe, images, folder)
    parts = 1 if recipe.train.accumulate == "auto" else recipe.train.accumulate
    train = dataclasses.replace(recipe.train, image_memory=0.0, accumulate=parts)
    small = dataclasses.replace(small, train=train)
    measure_teacher_pass(small, model)
    engine, job = Engine(small.train), tasks.build(small)
    needed = engine.micro_batch * parts * (steps + 1)
    own = _steps(small, job, engine, _own_batches(small, job, engine, needed), steps)
    plain = _steps(small, job, engine, _plain_batches(small, job, engine, folder, needed), steps)
    total = small.train.batch_size * steps
    return [
        Measurement("training", total / own.seconds, "images/s", PLAIN, total / plain.seconds),
        Measurement(
            "training: waiting for data",
            100 * own.waiting / own.seconds,
            "% of the time",
            PLAIN,
            100 * plain.waiting / plain.seconds,
        ),
        Measurement("training: memory of this process", own.memory / 1e9, "GB", PLAIN, plain.memory / 1e9),
    ]


def _own_batches(recipe: Recipe, job: Job, engine: Engine, needed: int) -> Iterator[Batch]:
    data = RepeatedData(job.train, needed)
    places = [(0, shard, index) for shard, count in enumerate(data.counts) for index in range(count)][:needed]
    return batches(data, _split(places, engine.micro_batch), recipe.train.workers)


def _plain_batches(recipe: Recipe, job: Job, engine: Engine, folder: Path, needed: int) -> Iterable[Batch]:
    assert isinstance(job.task, tasks.Distill) and job.complete is not None
    counts, files = job.train.counts, []
    for shard, index in ((shard, index) for shard, count in enumerate(counts) for index in range(count)):
        batch = job.complete(fill(job.train, [(0, shard, index)]))
        paths = {}
        for name, value in batch["outputs"].items():
            path = folder / f"{shard}-{index}-{name}.npy"
            np.save(path, value[0].numpy())
            paths[name] = str(path)
        sample = {name: value for name, value in job.train.item(0, shard, index).items() if name != "pixels"}
        files.append({"shard": batch["shards"][0], "key": batch["keys"][0], "outputs": paths, "sample": sample})
    workers = min(recipe.train.workers, cores())
    data = NpyFiles(build_images(recipe.images), job.task.preprocess, files, needed)
    return DataLoader(
        data, engine.micro_batch, num_workers=workers, collate_fn=collate, pin_memory=torch.cuda.is_available()
    )


def _steps(recipe: Recipe, job: Job, engine: Engine, parts: Iterable[Batch], steps: int) -> TrainingSpeed:
    """Take one step that is not measured, then `steps` steps; the optimizer's state begins anew."""
    accelerator, accumulate = engine.accelerator, recipe.train.parts
    task = job.task.to(accelerator.device).train()
    optimizer = bind(recipe.optimizer, OPTIMIZERS, "optimizer", context=("model",))(task)
    before, loaded, waiting, start = begin_memory(accelerator.device), iter(parts), 0.0, 0.0
    for step in range(steps + 1):
        if step == 1:
            _wait(accelerator.device)
            waiting, start = 0.0, time.perf_counter()
        began = time.perf_counter()
        ready = list(itertools.islice(loaded, accumulate))
        waiting += time.perf_counter() - began
        complete = None if "stored" not in ready[0] else job.complete
        for batch in step_batches(iter(ready), engine, job.shared, complete):
            with engine.autocast():
                loss = task({**batch, "epoch": 0.0, "progress": 0.0})["loss"]
            (loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _wait(accelerator.device)
    return TrainingSpeed(time.perf_counter() - start, waiting, peak_memory(accelerator.device) - before)


def _split(places: list[tuple[int, int, int]], size: int) -> list[list[tuple[int, int, int]]]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def begin_memory(device: torch.device) -> int:
    """Begin to record the peak of memory, and return the bytes in use: of the GPU, else of this process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's command that resets VmHWM
    except OSError:  # not Linux
        return 0
    return _status("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Return the peak of memory since `begin_memory` in bytes: of the GPU, else of this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    """Return a value of /proc/self/status in bytes, 0 if the system has none."""
    try:
        matched = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(matched[1]) * 1024 if matched else 0
