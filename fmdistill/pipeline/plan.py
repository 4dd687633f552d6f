"""Estimate a recipe's images, bytes and hours before the work begins, by measuring a few of its images."""

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fmdistill.cache as cache
from fmdistill import pipeline
from fmdistill.cache import Cache, finished, manifest, store
from fmdistill.cache.codec import EXACT, named
from fmdistill.cache.footprint import COUNTED, Disk, count, estimate_disk
from fmdistill.cache.order import Batches
from fmdistill.distill.train import too_few_images, total_steps
from fmdistill.images import Images, Shard
from fmdistill.images import build as build_images
from fmdistill.images.source import SPLITS
from fmdistill.pipeline.rehearsal import (
    MeasuredPass,
    check_single_process,
    device_name,
    measure_teacher_pass,
    step_seconds,
    with_few_images,
)
from fmdistill.recipe import Recipe, Train
from fmdistill.registry import UserError
from fmdistill.stages import by_stage
from fmdistill.teachers.family import Teacher


@dataclass(frozen=True)
class PlanSettings:
    """The settings plan.KEY=VALUE."""

    images: int | None = None  # of each split to measure with; null = two of the teacher's batches
    steps: int = 3  # training steps to measure, after one that warms up
    gpus: list[int] | int = field(default_factory=lambda: [1, 2, 4, 8])  # numbers of devices to estimate hours for

    def __post_init__(self) -> None:
        settings = {"images": [1 if self.images is None else self.images], "steps": [self.steps], "gpus": self.devices}
        for name, values in settings.items():
            if min(values, default=0) < 1:
                raise UserError(f"plan.{name}={getattr(self, name)}: expected 1 or more")

    @property
    def devices(self) -> list[int]:
        """The numbers of devices as a list, also if `gpus` is a single number."""
        return [self.gpus] if isinstance(self.gpus, int) else self.gpus


@dataclass(frozen=True)
class PlannedTraining:
    """The estimated training of one stage of a recipe."""

    settings: Train
    device: str
    steps: int
    seconds: float  # of a step

    @property
    def hours(self) -> float:
        """Hours of training from the first step."""
        return self.steps * self.seconds / 3600


@dataclass(frozen=True)
class Plan:
    """The estimated work of a recipe; hours are for one device of the measured kind."""

    recipe: Recipe
    images: dict[str, int]  # by split
    shards: dict[str, int]
    counted: bool  # whether the images of every shard were counted, not only those of some shards
    disk: Disk | None  # None if nothing is cached
    teacher_pass: MeasuredPass | None  # None if nothing is cached
    missing_images: int
    device: str  # of the teacher
    training: dict[str, PlannedTraining]  # by stage, "" if it is the only one
    gpus: list[int]
    why_no_cache: str = ""

    def __str__(self) -> str:
        return text(self, self.recipe.out)

    @property
    def rate(self) -> float:
        """Images per second of the teacher pass."""
        return self.teacher_pass.images / self.teacher_pass.seconds if self.teacher_pass else 0.0

    @property
    def teacher_hours(self) -> float:
        """Hours of the teacher pass over the images that are not cached yet."""
        return self.missing_images / self.rate / 3600 if self.teacher_pass else 0.0

    @property
    def training_hours(self) -> float:
        """Hours of training, of all stages."""
        return sum(training.hours for training in self.training.values())

    @property
    def steps(self) -> int:
        """Training steps of all stages."""
        return sum(training.steps for training in self.training.values())

    @property
    def seconds(self) -> float:
        """The mean seconds of a training step."""
        return 3600 * self.training_hours / self.steps


def run(recipe: Recipe, settings: PlanSettings) -> Plan:
    """Measure a few of the recipe's images and return the plan, without touching the recipe's cache and run.

    Raises UserError if the recipe cannot run, or if its cache's root contains another cache.
    """
    check_single_process("plan")
    pipeline.check(recipe)
    images = build_images(recipe.images)
    shards = images.shards()
    counts, counted = count(images, shards)
    by_name = dict(zip([s.name for s in shards], counts, strict=True))
    totals = {split: round(sum(by_name[s.name] for s in shards if s.split == split)) for split in SPLITS}
    stages = by_stage(recipe)
    for stage in stages.values():
        if totals["train"] < stage.train.batch_size:
            raise too_few_images(stage.train.batch_size, totals["train"])
    cached = recipe.teacher is not None and not finished.is_live(recipe.teacher)
    model = cache.load_teacher(recipe) if cached else None
    missing = _missing(recipe, images, shards, model) if model else []
    with tempfile.TemporaryDirectory(prefix="fmdistill-plan-") as folder:
        few = settings.images or (2 * model.batch if model else recipe.train.batch_size)
        small = with_few_images(recipe, few, Path(folder))
        teacher_pass = measure_teacher_pass(small, model) if model else None
        disk = _disk(recipe, small, shards, by_name, missing) if model else None
        device = device_name(str((recipe.teacher or {}).get("device", "auto")), "teacher.device")
        model = None  # frees the device's memory for training
        training = {
            name: _training(stage, small_stage, totals["train"], settings.steps)
            for (name, stage), small_stage in zip(stages.items(), _drawn_stages(small), strict=True)
        }
    return Plan(
        recipe=recipe,
        images=totals,
        shards={split: sum(s.split == split for s in shards) for split in SPLITS},
        counted=counted,
        disk=disk,
        teacher_pass=teacher_pass,
        missing_images=round(sum(by_name[s.name] for s in missing)),
        device=device,
        training=training,
        gpus=settings.devices,
        why_no_cache="" if cached else ("teacher.live=true" if recipe.teacher else "no teacher"),
    )


def _drawn_stages(recipe: Recipe) -> list[Recipe]:
    """Return the recipe's stages, where those that begin with an earlier one's student begin with a drawn one."""
    first, *later = by_stage(recipe).values()
    return [first, *(dataclasses.replace(stage, student=stage.student | {"pretrained": "none"}) for stage in later)]


def _training(recipe: Recipe, small: Recipe, images: int, steps: int) -> PlannedTraining:
    """Estimate the training of a stage on so many images; the recipe `small` is run to measure the seconds."""
    train = recipe.train
    total = total_steps(train, Batches((images,), train.batch_size, recipe.seed, train.window))
    return PlannedTraining(train, device_name(train.device, "train.device"), total, step_seconds(small, steps))


def _missing(recipe: Recipe, images: Images, shards: Sequence[Shard], model: Teacher) -> list[Shard]:
    assert recipe.cache is not None
    opened = store.opened(recipe.cache)
    if not (opened.folder / manifest.NAME).exists():
        return list(shards)
    fields = manifest.claim(opened.folder, cache.identity(recipe, images, model))  # only reads, since it exists
    return finished.missing(opened, shards, fields)


def _disk(
    recipe: Recipe, small: Recipe, shards: Sequence[Shard], by_name: Mapping[str, float], missing: Sequence[Shard]
) -> Disk:
    assert recipe.cache is not None and small.cache is not None
    measured = Cache(store.of(small.cache), build_images(small.images), small.teacher)
    return estimate_disk(store.of(recipe.cache).folder, measured, shards, by_name, missing)


def text(plan: Plan, name: str) -> str:
    """Format the plan of the recipe called `name` as text."""
    lines = [f"Plan of {name}. Nothing was written into its cache or its run.", ""]
    how = "counted" if plan.counted else f"estimated from {COUNTED} shards of a split"
    parts = [f"{plan.images[split]} {split} in {plan.shards[split]} shards" for split in SPLITS]
    lines.append(f"images        {', '.join(parts)} ({how})")
    lines += _disk_lines(plan) if plan.disk else [f"cache         none: {plan.why_no_cache}"]
    if measured := plan.teacher_pass:
        failed = f", {measured.failed} of them without an output" if measured.failed else ""
        lines.append(f"teacher pass  {plan.rate:.3g} images/s, of {measured.images} images{failed}, on {plan.device}")
        lines += _failed_lines(plan, measured)
    with_teacher = ", including the live teacher" if plan.why_no_cache.startswith("teacher.live") else ""
    for name, training in plan.training.items():
        batch_size = training.settings.batch_size
        lines.append(
            f"{f'stage {name}' if name else 'training':13} {batch_size / training.seconds:.3g} images/s, "
            f"{training.seconds:.3g} s a step of {batch_size} images, {training.steps} steps, on "
            f"{training.device}{with_teacher}"
        )
    lines += ["", "| devices like this | teacher pass | training | together |", "|---|---|---|---|"]
    lines += [_times(plan, count) for count in plan.gpus]
    lines += [
        "",
        "Times are those measured on one device, divided by the number of devices, without losses by synchronization.",
    ]
    lines.append("Not included: evaluation, validation during training, and loading teacher and student.")
    return "\n".join(lines)


def _failed_lines(plan: Plan, measured: MeasuredPass) -> list[str]:
    """Return a warning if more of the measured images failed than `cache.max_failed` allows."""
    assert plan.recipe.cache is not None
    share, allowed = measured.failed / measured.images, plan.recipe.cache.max_failed
    if share <= allowed or not plan.missing_images:
        return []
    return [
        f"WOULD STOP    caching, if as many images fail as here: {share:.1%} of the images have no output, more than "
        f"cache.max_failed={allowed:g}. Repair or remove them, or set "
        f"cache.max_failed={math.ceil(100 * share) / 100:g}"
    ]


def _times(plan: Plan, count: int) -> str:
    settings = [training.settings for training in plan.training.values()]
    odd = next((train.batch_size for train in settings if not train.divides(count)), None)
    training = _time(plan.training_hours / count) if odd is None else "-"
    both = _time((plan.teacher_hours + plan.training_hours) / count) if odd is None else "-"
    why = "" if odd is None else f" train.batch_size={odd} is not divisible by {count} devices |"
    return f"| {count} | {_time(plan.teacher_hours / count)} | {training} | {both} |{why}"


def _disk_lines(plan: Plan) -> list[str]:
    disk, settings = plan.disk, plan.recipe.cache
    assert disk is not None and settings is not None
    sizes = ", ".join(f"{_setting(label, ' with ')} {_bytes(size)}" for label, size in disk.tars.items())
    total, shards = disk.tars[disk.codec] + disk.sidecars + disk.beside, sum(plan.shards.values())
    is_url = "://" in settings.root
    where = f"{settings.root}, copies in {disk.root}" if is_url else str(disk.root)
    lines = [
        f"embeddings    by codec of the training images: {sizes}; validation images are always {EXACT}",
        f"other files   sidecars {_bytes(disk.sidecars)}, manifest and the teacher's head {_bytes(disk.beside)}",
        f"cache         {_bytes(total)} with cache.codec={_setting(disk.codec)} in {where}; "
        f"{shards - disk.missing_shards} of {shards} shards exist, {_bytes(disk.missing)} are missing; "
        f"{_bytes(disk.free)} free{' on this machine' * is_url}",
    ]
    if plan.missing_images:
        _, images, size = disk.held[0]
        lines.append(
            f"a shard       up to {images:,.0f} images, {_bytes(size)}, {_time(images / plan.rate / 3600)} of the "
            f"teacher: the most that a killed process loses"
        )
    return lines + (_window_lines(plan, disk) if is_url else _full_disk_lines(disk))


def _full_disk_lines(disk: Disk) -> list[str]:
    """Return a warning if the disk has too little space for the missing shards."""
    if disk.missing <= disk.free:
        return []
    enough = disk.tars[disk.codec] - (disk.missing - disk.free)
    # Trimmed codecs do not suit every objective; of the others, the largest that fits loses the least precision.
    fitting = [name for name, size in disk.tars.items() if size <= enough and not named(name).trim]
    codec = f" cache.codec={max(fitting, key=lambda name: disk.tars[name])}," if fitting else ""
    return [
        f"TOO LITTLE    space: the disk needs {_bytes(disk.missing - disk.free)} more. Set "
        f"images.limit={disk.limit},{codec} or another cache.root=FOLDER"
    ]


def _window_lines(plan: Plan, disk: Disk) -> list[str]:
    """Return a warning if the shards of a training window exceed the limit of local copies of a bucket."""
    assert plan.recipe.cache is not None
    window = max(training.settings.window for training in plan.training.values())
    allowed = plan.recipe.cache.local_bytes
    needed = sum(sorted(size for split, _, size in disk.held if split == "train")[-window:])
    if needed <= allowed:
        return []
    enough = float(f"{1.1 * needed / 1e9:.2g}")
    return [
        f"TOO LITTLE    train.window={window} shards take {_bytes(needed)}, more than "
        f"cache.local_gb={allowed / 1e9:g}: training would download them again and again. Set "
        f"cache.local_gb={enough:g}, or a smaller train.window"
    ]


def _setting(label: str, joint: str = " ") -> str:
    """Return the value of cache.codec for a codec's label, and cache.trim=true if it trims."""
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
