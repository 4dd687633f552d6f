"""The only training loop. It knows steps, not objectives: it minimises the "loss" that a task returns."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial

import torch
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from fmdistill import stop
from fmdistill.cache.batch import Batch, Data, to_device
from fmdistill.cache.order import Batches
from fmdistill.distill.data import every
from fmdistill.distill.engine import Engine
from fmdistill.distill.fitting import Complete, Shared, choose_parts, naming_memory
from fmdistill.distill.guards import FiniteSteps, Movement, check_first_step
from fmdistill.distill.loader import batches
from fmdistill.distill.optim import OPTIMIZERS, SCHEDULES, LearningRates
from fmdistill.distill.run_files import RunFiles
from fmdistill.distill.state import TrainingState
from fmdistill.logs import progress
from fmdistill.recipe import Recipe, Train
from fmdistill.registry import UserError, bind

Validator = Callable[[nn.Module], dict[str, float]]


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

    With `train.ema`, the task has the moving average of its weights afterwards. `complete` adds values to each
    micro-batch on its device; batch["epoch"] is the number of epochs done, batch["progress"] the share of the steps
    done before this one. The tensors that `shared` returns for each micro-batch are gathered over all processes and all
    accumulation, and every micro-batch of the step has them as batch["whole"], in the order of the global batch. An
    objective that needs no more of other images thus has the same gradient for any number of processes and any
    accumulation. BatchNorm in train mode is an exception: its statistics are one micro-batch's.
    """
    accelerator = engine.accelerator
    recipe = choose_parts(task.to(accelerator.device).train(), data, recipe, engine, shared, complete)
    settings, plan = recipe.train, _plan(data, recipe, engine)
    steps = total_steps(settings, plan)
    optimizer = bind(recipe.optimizer, OPTIMIZERS, "optimizer", context=("model",))(task)
    rates = LearningRates(optimizer, bind(recipe.schedule, SCHEDULES, "schedule")(), steps)
    state = TrainingState.begin(task, optimizer, settings, accelerator.is_main_process)
    files, movement = RunFiles(recipe, state, plan.identity, accelerator.is_main_process), Movement(task, steps)
    start, model = files.resume(), accelerator.prepare(task, optimizer)[0]
    files.begin()
    if start and _due(start, settings.validate_every, steps) and not engine.any(files.validated()):  # a stop was first
        files.judge(start, partial(validate, model))
    parts, clock = batches(data, plan.between(start, steps), settings.workers), time.monotonic()
    bar = progress(total=steps, initial=start, description=f"training {files.run.name}", unit="step")
    with bar, closing(parts), closing(files):
        for step in range(start, steps):
            with files.saving_if_stopped(step):
                engine.check_stop()
            torch.manual_seed(hash((recipe.seed, step, accelerator.process_index)) % 2**63)
            rates.set(step)
            state.finite.begin()
            with naming_memory(step, engine):
                with files.saving_if_stopped(step, undo=True):
                    step_parts = step_batches(parts, engine, shared, complete)
                    losses = _backward(model, step_parts, engine, state.finite, _when(step, steps, plan))
                norm: Tensor = accelerator.clip_grad_norm_(model.parameters(), settings.clip or math.inf)  # type: ignore
                check_first_step(step, task, losses, norm, settings.best)
                state.update(step, norm)
            done = step + 1
            bar.update(1)
            movement.check(done, rates, state.finite)
            if _due(done, settings.log_every, steps) or done == 1:
                row = _row(engine, losses, norm, state.finite)
                bar.set_postfix(loss=f"{row.get('loss', math.nan):.4g}")
                speed = (done - start) * settings.batch_size / (time.monotonic() - clock)
                files.write(done, {**row, "learning_rate": rates.first, "images_per_second": round(speed, 2)})
            if _due(done, settings.validate_every, steps):
                files.judge(done, partial(validate, model))
            if _due(done, settings.checkpoint_every, steps):
                files.save_if_sound(done)
        state.finish(steps)
    return steps


def _row(engine: Engine, losses: dict[str, Tensor], norm: Tensor, finite: FiniteSteps) -> dict[str, float]:
    """Return the finite ones of a step's losses, the norm of its gradient, and the number of steps skipped so far."""
    finite.settle()
    row = engine.mean({**losses, "grad_norm": norm})
    return {**{name: value for name, value in row.items() if math.isfinite(value)}, "skipped": finite.skipped}


def _due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps


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
    return Batches(counts, settings.batch_size, recipe.seed, settings.window, accumulate=settings.parts, **place)


def _when(step: int, steps: int, plan: Batches) -> dict[str, float]:
    """Return the epochs done with this step, and the share of the run's steps done before it."""
    return {"epoch": (step + 1) / plan.steps_per_epoch, "progress": step / steps}


def _backward(
    model: nn.Module, parts: Iterator[Batch], engine: Engine, finite: FiniteSteps, when: Mapping[str, float]
) -> dict[str, Tensor]:
    """Accumulate the gradients of one step, `when` in the run; return its losses, averaged over its micro-batches."""
    accelerator, accumulate = engine.accelerator, engine.settings.parts
    sums: dict[str, Tensor] = {}
    for part, batch in enumerate(parts):
        last = part == accumulate - 1
        with nullcontext() if last else accelerator.no_sync(model):
            with engine.autocast():
                losses = model({**batch, **when})
            accelerator.backward(finite.scaled(losses["loss"], batch["keys"], accumulate))
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros_like(value.detach())) + value.detach() / accumulate
    return sums


def step_batches(
    parts: Iterator[Batch], engine: Engine, shared: Shared | None = None, complete: Complete | None = None
) -> Iterator[Batch]:
    """Yield the micro-batches of one optimizer step on the device, each with the step's shared tensors as "whole"."""
    device = engine.accelerator.device
    step: Iterable[Batch] = (to_device(batch, device) for batch in itertools.islice(parts, engine.settings.parts))
    if complete is not None:
        step = map(complete, step)
    whole: dict[str, Tensor] = {}
    if shared is not None:
        step = list(step)
        _number(step, engine)
        with engine.autocast(), _same_draws(device):
            tensors = [shared(batch) for batch in step]
        own = {name: torch.cat([part[name] for part in tensors]) for name in sorted(tensors[0])}
        whole = {name: engine.accelerator.gather(value) for name, value in own.items()}  # type: ignore[misc]
    for batch in step:
        batch["whole"] = whole
        yield batch


def _number(step: Sequence[Batch], engine: Engine) -> None:
    """Write into each of a process's batches of a step their number over all processes, and its place among them."""
    parts, world = len(step), engine.accelerator.num_processes
    for part, batch in enumerate(step):
        batch["parts"] = parts * world
        batch["first"] = (engine.accelerator.process_index * parts + part) * engine.micro_batch


def _same_draws(device: torch.device) -> AbstractContextManager:
    """Return a context after which random numbers go on as before it: a student's layers draw what they drew in it."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else [])
