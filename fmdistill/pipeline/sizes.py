"""Fit a new recipe's training to the number of images and to this machine, by rules that its comments state."""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from fmdistill.backbones.device import cores
from fmdistill.recipe import Train

USABLE = 0.8  # share of a GPU's memory for what a step keeps; of a CPU's memory USABLE_CPU
USABLE_CPU = 0.4
IN_MEMORY = 1e9  # bytes of prepared images that are kept in memory, so that later epochs decode nothing
LEAST_BATCH = 4
STEPS_AN_EPOCH = 8  # at least, of few images
GPU_WORKERS = 8


@dataclass(frozen=True)
class Workload:
    """What training costs and needs: the images' side, GB that one keeps for the backward pass, epochs and steps."""

    side: int
    gigabytes: float
    epochs: int
    least: int
    most: int | None = None


@dataclass(frozen=True)
class Machine:
    """A machine: the name of its GPU ("" if it has none), the memory of the GPU or else of the machine in GB, and the
    number of CPU cores.
    """

    gpu: str
    memory: float
    cores: int

    @property
    def text(self) -> str:
        """What it is, in words."""
        cores = f"{self.cores} CPU core{'s' * (self.cores != 1)}"
        device = f"{self.gpu}, {self.memory:.0f} GB" if self.gpu else f"no GPU, {self.memory:.0f} GB of memory"
        return f"{device}, {cores}"


def this_machine() -> Machine:
    """Return the machine that this process runs on."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return Machine(device.name, device.total_memory / 1e9, cores())
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):  # not every system tells
        memory = 8.0
    return Machine("", memory, cores())


def sizes(work: Workload, train: int, base: Train, machine: Machine) -> tuple[dict[str, Any], dict[str, str]]:
    """Return settings of `train` for so many training images, and a comment on each by its dotted name."""
    batch = _batch(train, base.batch_size)
    steps = max(work.least, math.ceil(work.epochs * train / batch))
    steps = min(steps, work.most or steps)
    fitting = _fitting(work, machine)
    settings: dict[str, Any] = {"steps": steps, "batch_size": batch}
    comments = {
        "train.steps": _about_steps(work, steps, train, batch),
        "train.batch_size": f"the largest power of two up to {base.batch_size} that leaves {STEPS_AN_EPOCH} steps an "
        f"epoch, but at least {LEAST_BATCH}",
    }
    if fitting < batch:
        settings["accumulate"] = batch // fitting
        comments["train.accumulate"] = (
            f"parts of {fitting}: each image keeps about {work.gigabytes} GB until the backward pass"
        )
    settings["workers"] = min(GPU_WORKERS, machine.cores) if machine.gpu else 1
    comments["train.workers"] = "processes that load images, one a core" if machine.gpu else "the cores train"
    stored = train * 3 * work.side**2
    if stored <= IN_MEMORY:
        settings["image_memory"] = math.ceil(stored / 1e8) / 10
        comments["train.image_memory"] = "GB of prepared images, all of them"
    for name in ("validate_every", "checkpoint_every"):
        settings[name] = min(getattr(base, name), math.ceil(steps / 4))
    comments["train.checkpoint_every"] = "a killed run loses no more steps than these"
    return settings, comments


def _about_steps(work: Workload, steps: int, train: int, batch: int) -> str:
    passes = steps * batch / train
    if steps == work.least:
        return f"the fewest that are worth a try: {passes:.0f} epochs of so few images"
    if steps == work.most:
        return f"enough for a first try: {passes:.1f} epochs"
    return f"{work.epochs} epochs"


def _batch(train: int, largest: int) -> int:
    wanted = min(largest, max(train // STEPS_AN_EPOCH, min(LEAST_BATCH, train)))
    return 2 ** int(math.log2(wanted))


def _fitting(work: Workload, machine: Machine) -> int:
    """Return the largest power of two of images whose backward pass fits into the memory; fp32 on a CPU needs twice."""
    share, factor = (USABLE, 1) if machine.gpu else (USABLE_CPU, 2)
    return 2 ** int(math.log2(max(1.0, share * machine.memory / (factor * work.gigabytes))))
