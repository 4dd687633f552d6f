"""Plan a recipe before anything is spent: images, bytes and hours, from a handful of images that run now."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fmdistill import cache, pipeline
from fmdistill.cache import Cache, finished, manifest, store
from fmdistill.cache.codec import EXACT, named
from fmdistill.cache.footprint import COUNTED, Disk, count, estimate_disk
from fmdistill.cache.order import Batches
from fmdistill.distill.train import too_few_images, total_steps
from fmdistill.images import Images, Shard
from fmdistill.images import build as build_images
from fmdistill.images.source import SPLITS
from fmdistill.pipeline.rehearsal import Taught, alone, device_name, on_handful, step_seconds, teach
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.teachers.family import Teacher


@dataclass(frozen=True)
class Settings:
    """What plan.KEY=VALUE sets."""

    images: int | None = None  # of each split to measure on; null = two of the teacher's batches
    steps: int = 3  # training steps to measure, after one that warms up
    gpus: list[int] | int = field(default_factory=lambda: [1, 2, 4, 8])  # how many devices to tell the hours of

    def __post_init__(self) -> None:
        given = {"images": [1 if self.images is None else self.images], "steps": [self.steps], "gpus": self.devices}
        for name, values in given.items():
            if min(values, default=0) < 1:
                raise UserError(f"plan.{name}={getattr(self, name)}: expected 1 or more")

    @property
    def devices(self) -> list[int]:
        """How many devices to tell the hours of, in a list also where one number was given."""
        return [self.gpus] if isinstance(self.gpus, int) else self.gpus


@dataclass(frozen=True)
class Plan:
    """What a recipe will take; hours are those of one device like the measured one."""

    recipe: Recipe
    images: dict[str, int]  # by split
    shards: dict[str, int]
    counted: bool  # whether every shard was counted, rather than a sample of them
    disk: Disk | None  # None where nothing is cached
    taught: Taught | None
    missing_images: int
    devices: tuple[str, str]  # of the teacher and of training
    steps: int
    seconds: float  # of a training step
    gpus: list[int]
    why_no_cache: str = ""

    @property
    def rate(self) -> float:
        """Images a second of the teacher pass."""
        return self.taught.images / self.taught.seconds if self.taught else 0.0

    @property
    def teacher_hours(self) -> float:
        """Hours of the teacher pass over the images that are not cached yet."""
        return self.missing_images / self.rate / 3600 if self.taught else 0.0

    @property
    def training_hours(self) -> float:
        """Hours of training from the first step."""
        return self.steps * self.seconds / 3600


def run(recipe: Recipe, settings: Settings) -> Plan:
    """Measure a handful of the recipe's images and return the plan; its cache's root and its run are not touched.

    UserError where the recipe cannot run, or where its cache's root holds another cache.
    """
    alone("plan")
    pipeline.check(recipe)
    images = build_images(recipe.images)
    shards = images.shards()
    counts, counted = count(images, shards)
    by_name = dict(zip([s.name for s in shards], counts, strict=True))
    totals = {split: round(sum(by_name[s.name] for s in shards if s.split == split)) for split in SPLITS}
    train = recipe.train
    if totals["train"] < train.batch_size:
        raise too_few_images(train.batch_size, totals["train"])
    cached = recipe.teacher is not None and not finished.is_live(recipe.teacher)
    model = cache.load_teacher(recipe) if cached else None
    missing = _missing(recipe, images, shards, model) if model else []
    with tempfile.TemporaryDirectory(prefix="fmdistill-plan-") as folder:
        handful = settings.images or (2 * model.batch if model else train.batch_size)
        small = on_handful(recipe, handful, Path(folder))
        taught = teach(small, model) if model else None
        disk = _disk(recipe, small, shards, by_name, missing) if model else None
        place = device_name(str((recipe.teacher or {}).get("device", "auto")), "teacher.device")
        model = None  # training has the device for itself
        seconds = step_seconds(small, settings.steps)
    return Plan(
        recipe=recipe,
        images=totals,
        shards={split: sum(s.split == split for s in shards) for split in SPLITS},
        counted=counted,
        disk=disk,
        taught=taught,
        missing_images=round(sum(by_name[s.name] for s in missing)),
        devices=(place, device_name(train.device, "train.device")),
        steps=total_steps(train, Batches((totals["train"],), train.batch_size, recipe.seed, train.window)),
        seconds=seconds,
        gpus=settings.devices,
        why_no_cache="" if cached else ("teacher.live=true" if recipe.teacher else "no teacher"),
    )


def _missing(recipe: Recipe, images: Images, shards: Sequence[Shard], model: Teacher) -> list[Shard]:
    assert recipe.cache is not None
    opened = store.opened(recipe.cache)
    if not (opened.folder / manifest.NAME).exists():
        return list(shards)
    found = manifest.claim(opened.folder, cache.identity(recipe, images, model))  # reads, since there is one
    return finished.missing(opened, shards, found)


def _disk(
    recipe: Recipe, small: Recipe, shards: Sequence[Shard], by_name: Mapping[str, float], missing: Sequence[Shard]
) -> Disk:
    assert recipe.cache is not None and small.cache is not None
    measured = Cache(store.of(small.cache), build_images(small.images), small.teacher)
    return estimate_disk(store.of(recipe.cache).folder, measured, shards, by_name, missing)


def text(plan: Plan, name: str) -> str:
    """Return the plan of the recipe called `name` as a person reads it."""
    lines = [f"Plan of {name}. Nothing was written into its cache or its run.", ""]
    how = "counted" if plan.counted else f"about: {COUNTED} shards of a split were counted"
    parts = [f"{plan.images[split]} {split} in {plan.shards[split]} shards" for split in SPLITS]
    lines.append(f"images        {', '.join(parts)} ({how})")
    lines += _disk_lines(plan) if plan.disk else [f"cache         none: {plan.why_no_cache}"]
    if plan.taught:
        taught = plan.taught
        failed = f", {taught.failed} of them without an output" if taught.failed else ""
        lines.append(f"teacher pass  {plan.rate:.3g} images/s, of {taught.images} images{failed}, on {plan.devices[0]}")
        lines += _failed_lines(plan, taught)
    batch_size = plan.recipe.train.batch_size
    with_teacher = ", the live teacher among it" if plan.why_no_cache.startswith("teacher.live") else ""
    lines.append(
        f"training      {batch_size / plan.seconds:.3g} images/s, {plan.seconds:.3g} s a step of "
        f"{batch_size} images, {plan.steps} steps, on {plan.devices[1]}{with_teacher}"
    )
    lines += ["", "| devices like this | teacher pass | training | together |", "|---|---|---|---|"]
    lines += [_times(plan, count) for count in plan.gpus]
    lines += [
        "",
        "Times are those of one device as measured now, divided by the devices: no loss by sharing is counted.",
    ]
    lines.append("Left out: evaluation, validation during training, and loading teacher and student.")
    return "\n".join(lines)


def _failed_lines(plan: Plan, taught: Taught) -> list[str]:
    assert plan.recipe.cache is not None
    share, allowed = taught.failed / taught.images, plan.recipe.cache.max_failed
    if share <= allowed or not plan.missing_images:
        return []
    return [
        f"WOULD STOP    caching, where as many fail as here: {share:.1%} of the images gave no output, more than "
        f"cache.max_failed={allowed:g}. The way out: repair or remove them, or set "
        f"cache.max_failed={math.ceil(100 * share) / 100:g}"
    ]


def _times(plan: Plan, count: int) -> str:
    train = plan.recipe.train
    fits = train.batch_size % (count * train.accumulate) == 0
    training = _time(plan.training_hours / count) if fits else "-"
    both = _time((plan.teacher_hours + plan.training_hours) / count) if fits else "-"
    why = "" if fits else f" train.batch_size={train.batch_size} is not divisible by {count} devices |"
    return f"| {count} | {_time(plan.teacher_hours / count)} | {training} | {both} |{why}"


def _disk_lines(plan: Plan) -> list[str]:
    disk, settings = plan.disk, plan.recipe.cache
    assert disk is not None and settings is not None
    sizes = ", ".join(f"{_setting(label, ' with ')} {_bytes(size)}" for label, size in disk.tars.items())
    total, shards = disk.tars[disk.codec] + disk.sidecars + disk.beside, sum(plan.shards.values())
    far = "://" in settings.root
    where = f"{settings.root}, copies in {disk.root}" if far else str(disk.root)
    lines = [
        f"embeddings    by codec of the training images: {sizes}; validation's are {EXACT} in each",
        f"beside them   sidecars {_bytes(disk.sidecars)}, manifest and the teacher's head {_bytes(disk.beside)}",
        f"cache         {_bytes(total)} with cache.codec={_setting(disk.codec)} in {where}; "
        f"{shards - disk.missing_shards} of {shards} shards are there, {_bytes(disk.missing)} to come; "
        f"{_bytes(disk.free)} free{' here' * far}",
    ]
    if plan.missing_images:
        _, images, size = disk.held[0]
        lines.append(
            f"a shard       up to {images:,.0f} images, {_bytes(size)}, {_time(images / plan.rate / 3600)} of the "
            f"teacher: the most that a killed process loses"
        )
    return lines + (_window_lines(plan, disk) if far else _lacking_lines(disk))


def _lacking_lines(disk: Disk) -> list[str]:
    if disk.missing <= disk.free:
        return []
    enough = disk.tars[disk.codec] - (disk.missing - disk.free)
    # Not trimmed, which not every objective takes; of the others the largest is the least lossy.
    fitting = [name for name, size in disk.tars.items() if size <= enough and not named(name).trim]
    codec = f" cache.codec={max(fitting, key=lambda name: disk.tars[name])}," if fitting else ""
    return [
        f"TOO LITTLE    {_bytes(disk.missing - disk.free)} are lacking on that disk. The way out: "
        f"images.limit={disk.limit},{codec} or another cache.root=FOLDER"
    ]


def _window_lines(plan: Plan, disk: Disk) -> list[str]:
    """Return a warning where training draws from more shards at once than a bucket's copies here may take."""
    assert plan.recipe.cache is not None
    window, allowed = plan.recipe.train.window, plan.recipe.cache.local_bytes
    taken = sum(sorted(size for split, _, size in disk.held if split == "train")[-window:])
    if taken <= allowed:
        return []
    enough = float(f"{1.1 * taken / 1e9:.2g}")
    return [
        f"TOO LITTLE    train.window={window} shards take {_bytes(taken)}, more than cache.local_gb={allowed / 1e9:g}: "
        f"training would fetch them again and again. The way out: cache.local_gb={enough:g}, or a smaller train.window"
    ]


def _setting(label: str, joint: str = " ") -> str:
    """Return the value of cache.codec that gives the codec of this label, and cache.trim=true where it trims."""
    codec = named(label)
    return f"{codec.name}{joint}cache.trim=true" if codec.trim else codec.name


def _time(hours: float) -> str:
    if hours >= 0.1:
        return f"{hours:.3g} h" if hours < 100 else f"{hours:,.0f} h"
    return f"{60 * hours:.2g} min" if hours >= 1 / 60 else f"{3600 * hours:.2g} s"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if float(f"{count:.3g}") >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} bytes"
