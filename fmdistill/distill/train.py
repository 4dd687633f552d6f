"""The only training loop. It knows steps, not objectives: it minimises the "loss" that a task returns."""

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from fmdistill import stop
from fmdistill.backbones.device import has_bf16, pick_device
from fmdistill.cache.batch import Batch, Data, to_device
from fmdistill.cache.order import Batches
from fmdistill.distill import checkpoint
from fmdistill.distill.data import every
from fmdistill.distill.loader import batches
from fmdistill.distill.optim import OPTIMIZERS, SCHEDULES
from fmdistill.launcher import check_training, processes
from fmdistill.logs import JsonLines, progress, read_json_lines
from fmdistill.recipe import Recipe, Train
from fmdistill.registry import UserError, bind

Validator = Callable[[nn.Module], dict[str, float]]
Shared = Callable[[Batch], dict[str, Tensor]]
Complete = Callable[[Batch], Batch]


@dataclass
class Engine:
    """The process's rank, its device and its precision."""

    settings: Train
    accelerator: Accelerator = field(init=False)

    def __post_init__(self) -> None:
        check_training()
        device = pick_device(self.settings.device, "train.device")
        if device.index is not None and device.type != "mps":  # mps has a single device
            torch.get_device_module(device).set_device(device)
        try:  # "no": the recipe decides on autocast, not this machine's `accelerate config`
            self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        except ValueError as error:  # another run of this process trained on another device
            raise UserError(f"train.device={self.settings.device}: {error}") from None
        self._check_device(device)
        check_share(self.settings, self.accelerator.num_processes)

    def _check_device(self, device: torch.device) -> None:
        """Raise a UserError unless accelerate chose the device and the number of processes that were requested."""
        picked, (_, world) = self.accelerator.device, processes()
        if picked.type != device.type and self.settings.device != "auto":
            raise UserError(
                f"train.device={self.settings.device}: accelerate trains on {picked.type} in this process; unset "
                f"ACCELERATE_USE_CPU and ACCELERATE_TORCH_DEVICE, or set train.device={picked.type}"
            )
        if self.accelerator.num_processes != world:
            raise UserError(
                f"train.device={self.settings.device}: {world} processes were started, but accelerate does not join "
                f"processes on {picked.type}; start one process, or train on cuda or cpu"
            )

    @property
    def micro_batch(self) -> int:
        """Return the number of images of one forward pass on one device."""
        return self.settings.batch_size // (self.accelerator.num_processes * self.settings.accumulate)

    def autocast(self) -> Any:
        """Return the autocast context of the recipe's precision."""
        device, precision = self.accelerator.device, self.settings.precision
        bf16 = precision == "bf16" or (precision == "auto" and (device.type == "cuda" or has_bf16(device)))
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in any of the processes; all of them have to call it."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return float(self.accelerator.reduce(flags, "sum")) > 0  # type: ignore[arg-type]

    def check_stop(self) -> None:
        """Raise Stopped if any of the processes was asked to stop, so that all leave at the same step."""
        if self.any(stop.requested() is not None):
            raise stop.Stopped(stop.requested() or signal.SIGTERM)

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Return each value's mean over the processes that have it; a process without labels may lack some."""
        names, device = sorted({name for own in gather_object([list(values)]) for name in own}), self.accelerator.device
        own = [values[name].detach().float() if name in values else torch.zeros((), device=device) for name in names]
        counts = torch.tensor([float(name in values) for name in names], device=device)
        sums, counts = self.accelerator.reduce(torch.stack([torch.stack(own), counts]), "sum")
        return dict(zip(names, (sums / counts).tolist(), strict=True))


def fit(
    task: nn.Module,
    data: Data,
    recipe: Recipe,
    validate: Validator,
    engine: Engine,
    shared: Shared | None = None,
    complete: Complete | None = None,
) -> int:
    """Train `task` on `data` for the recipe's steps, resuming from the run's newest checkpoint; return the steps.

    `complete` adds values to each micro-batch on its device; batch["epoch"] is the number of epochs done. The tensors
    that `shared` returns for each micro-batch are gathered over all processes and all accumulation, and every
    micro-batch of the step has them as batch["whole"], in the order of the global batch. An objective that needs no
    more of other images thus has the same gradient for any number of processes and any accumulation. BatchNorm in train
    mode is an exception: its statistics are one micro-batch's (SyncBatchNorm, which is not used, needs a GPU).
    """
    settings, accelerator, run = recipe.train, engine.accelerator, Path(recipe.out)
    plan = _plan(data, recipe, engine)
    steps = total_steps(settings, plan)
    schedule = bind(recipe.schedule, SCHEDULES, "schedule")()
    optimizer = bind(recipe.optimizer, OPTIMIZERS, "optimizer", context=("model",))(task)
    rates = [group["lr"] for group in optimizer.param_groups]
    task.to(accelerator.device).train()
    start = checkpoint.resume(run, task, optimizer, plan.identity)
    model, optimizer = accelerator.prepare(task, optimizer)
    disk = _Disk(run, task, optimizer, plan.identity, accelerator.is_main_process, start)
    disk.begin()
    validates, saves = (_due(every, steps) for every in (settings.validate_every, settings.checkpoint_every))
    if start and validates(start) and not engine.any(disk.validated()):  # the run stopped before this validation
        disk.write(start, validate(model))
    parts, clock = batches(data, plan.between(start, steps), settings.workers), time.monotonic()
    with progress(total=steps, initial=start, description=f"training {run.name}", unit="step") as bar, closing(parts):
        for step in range(start, steps):
            with disk.saving_if_stopped(step):
                engine.check_stop()
            torch.manual_seed(hash((recipe.seed, step, accelerator.process_index)) % 2**63)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step, steps)
            micro_batches = step_batches(parts, engine, shared, complete)
            with disk.saving_if_stopped(step if settings.accumulate == 1 else None):  # else a step may be half done
                losses = _backward(model, micro_batches, engine, step, (step + 1) / plan.steps_per_epoch)
            norm = float(accelerator.clip_grad_norm_(model.parameters(), settings.clip or math.inf))  # type: ignore[arg-type]
            _check_gradient(task, losses, norm, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update(1)
            done = step + 1
            if done % settings.log_every == 0 or done in (1, steps):
                row = engine.mean({**losses, "grad_norm": torch.tensor(norm, device=accelerator.device)})
                bar.set_postfix(loss=f"{row['loss']:.4g}")
                speed = (done - start) * settings.batch_size / (time.monotonic() - clock)
                rate = optimizer.param_groups[0]["lr"]
                disk.write(done, {**row, "learning_rate": rate, "images_per_second": round(speed, 2)})
            if validates(done):
                with disk.saving_if_stopped(done):
                    disk.write(done, validate(model))
            if saves(done):
                disk.save(done)
    return steps


@dataclass
class _Disk:
    """A run's files on disk: the rows of its log, and its checkpoints. Only the first process writes."""

    run: Path
    task: nn.Module
    optimizer: torch.optim.Optimizer
    order: str
    writes: bool
    saved: int  # step of the newest checkpoint

    @property
    def rows(self) -> JsonLines:
        """Return the log."""
        return JsonLines(self.run / "metrics.jsonl")

    def begin(self) -> None:
        """Delete the rows logged after the newest checkpoint, since those steps are done again."""
        if self.writes:
            self.rows.truncate_after(self.saved)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Append a row to the log, unless it is empty."""
        if self.writes and row:
            self.rows.write({"step": step, **row})

    def validated(self) -> bool:
        """Return whether the validation losses of the newest checkpoint's step are logged."""
        logged = read_json_lines(self.rows.path)
        return any(name.startswith("validation/") for row in logged if row.get("step") == self.saved for name in row)

    def save(self, step: int) -> None:
        """Write a checkpoint, unless that step has one."""
        if self.writes and step > self.saved:
            checkpoint.save(self.run, step, self.task, self.optimizer, self.order)
            self.saved = step

    @contextmanager
    def saving_if_stopped(self, step: int | None) -> Iterator[None]:
        """Save the checkpoint of `step`, unless it is None, if a stop request ends the block."""
        try:
            yield
        except stop.Stopped:
            if step is not None:
                self.save(step)
            raise


def _due(every: int, steps: int) -> Callable[[int], bool]:
    return lambda step: step % every == 0 or step == steps


def check_share(settings: Train, processes: int) -> None:
    """Raise a UserError unless an optimizer step's images divide evenly among processes and accumulation."""
    if settings.batch_size % (processes * settings.accumulate):
        raise UserError(
            f"train.batch_size={settings.batch_size}: not divisible by "
            f"{processes} processes x train.accumulate={settings.accumulate}; "
            f"it is the number of images of one optimizer step"
        )


def too_few_images(batch_size: int, count: int) -> UserError:
    """Return the UserError for a batch larger than the number of training images, `count`."""
    return UserError(
        f"train.batch_size={batch_size}: there are only {count} training images; make it smaller, or add images"
    )


def total_steps(settings: Train, plan: Batches) -> int:
    """Return the number of optimizer steps by `train.steps` or `train.epochs`, at least one."""
    return settings.steps or max(1, round((settings.epochs or 0) * plan.steps_per_epoch))


def validator(data: Data, engine: Engine, complete: Complete | None = None) -> Validator:
    """Return a function from the task to its mean losses over `data`, with every sample used exactly once."""

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        accelerator = engine.accelerator
        sums: dict[str, Tensor] = {}
        count = torch.zeros((), device=accelerator.device)
        places = list(every(data, engine.micro_batch, accelerator.process_index, accelerator.num_processes))
        module = accelerator.unwrap_model(model).eval()
        for buffer in module.buffers():  # BatchNorm's statistics differ by process; the first process's are saved
            broadcast(buffer)
        loaded = batches(data, places, engine.settings.workers)
        # With several processes none may leave alone: the others would wait for it in the reductions below.
        for batch in stop.between(loaded) if accelerator.num_processes == 1 else loaded:
            size = len(batch["keys"])
            batch = to_device(batch, accelerator.device)
            with engine.autocast():
                losses = module(batch if complete is None else complete(batch))
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(count)) + value.float() * size
            count += size
        module.train()
        # A process may have no sample, but every process has to take part in every reduction.
        names = sorted({name for own in gather_object([list(sums)]) for name in own})
        rows = torch.stack([count, *(sums.get(name, torch.zeros_like(count)) for name in names)])
        total, *values = accelerator.reduce(rows, "sum").tolist()  # type: ignore[union-attr]
        return {f"validation/{name}": value / total for name, value in zip(names, values, strict=True)}

    return validate


def _plan(data: Data, recipe: Recipe, engine: Engine) -> Batches:
    settings, accelerator = recipe.train, engine.accelerator
    if sum(data.counts) < settings.batch_size:
        raise too_few_images(settings.batch_size, sum(data.counts))
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    counts = tuple(data.counts)
    return Batches(counts, settings.batch_size, recipe.seed, settings.window, accumulate=settings.accumulate, **place)


def _backward(model: nn.Module, parts: Iterator[Batch], engine: Engine, step: int, epoch: float) -> dict[str, Tensor]:
    """Accumulate the gradients of one step; return its losses, averaged over its micro-batches."""
    accelerator, accumulate = engine.accelerator, engine.settings.accumulate
    sums: dict[str, Tensor] = {}
    for part, batch in enumerate(parts):
        last = part == accumulate - 1
        with nullcontext() if last else accelerator.no_sync(model):
            with engine.autocast():
                losses = model({**batch, "epoch": epoch})
            _check_loss(losses["loss"].detach(), batch, step)
            accelerator.backward(losses["loss"] / accumulate)
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros_like(value.detach())) + value.detach() / accumulate
    return sums


def step_batches(
    parts: Iterator[Batch], engine: Engine, shared: Shared | None = None, complete: Complete | None = None
) -> Iterator[Batch]:
    """Yield the micro-batches of one optimizer step on the device, each with the step's shared tensors as "whole"."""
    device = engine.accelerator.device
    step: Iterable[Batch] = (to_device(batch, device) for batch in itertools.islice(parts, engine.settings.accumulate))
    if complete is not None:
        step = map(complete, step)
    whole: dict[str, Tensor] = {}
    if shared is not None:
        step = list(step)
        tensors = [shared(batch) for batch in step]
        own = {name: torch.cat([part[name] for part in tensors]) for name in sorted(tensors[0])}
        whole = {name: engine.accelerator.gather(value) for name, value in own.items()}  # type: ignore[misc]
    for batch in step:
        batch["whole"] = whole
        yield batch


def _check_loss(loss: Tensor, batch: Batch, step: int) -> None:
    if not torch.isfinite(loss):
        raise UserError(
            f"step {step + 1}: the loss is {float(loss)} for images {', '.join(batch['keys'][:4])}...; "
            f"lower optimizer.lr, set train.clip=1, or train.precision=fp32"
        )


def _check_gradient(task: nn.Module, losses: dict[str, Tensor], norm: float, step: int) -> None:
    if not math.isfinite(norm):
        raise UserError(f"step {step + 1}: the gradient's norm is {norm}; lower optimizer.lr or set train.clip=1")
    if step > 0:
        return
    if float(losses["loss"]) == 0:
        raise UserError("step 1: the loss is exactly zero: the objective compares nothing, or every weight is zero")
    without = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    if without or norm == 0:
        parameters = f"{len(without)} parameters, {without[0]} first" if without else "any parameter"
        raise UserError(f"step 1: no gradient reaches {parameters}; the student's output is cut off from the loss")
