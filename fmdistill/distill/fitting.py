"""Fit an optimizer step into the memory: name the settings if it is full, and choose `train.accumulate` by trials."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate.utils import release_memory
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from fmdistill import recipe as recipes
from fmdistill.cache.batch import Batch, Data, fill, to_device
from fmdistill.cache.order import Batches
from fmdistill.distill.engine import Engine
from fmdistill.distill.optim import OPTIMIZERS
from fmdistill.logs import log
from fmdistill.recipe import Recipe, Train
from fmdistill.registry import UserError, bind

Shared = Callable[[Batch], dict[str, Tensor]]
Complete = Callable[[Batch], Batch]


@contextmanager
def naming_memory(step: int, engine: Engine) -> Iterator[None]:
    """Raise a UserError that names the settings if the block runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        if not _is_full(error):
            raise
        device, tried = engine.accelerator.device, _tried(engine.settings, engine)
        raise UserError(f"step {step + 1}: the memory of {device} is full with {tried}") from error


def choose_parts(
    task: nn.Module,
    data: Data,
    recipe: Recipe,
    engine: Engine,
    shared: Shared | None = None,
    complete: Complete | None = None,
) -> Recipe:
    """Return the recipe with "auto" as `train.accumulate` replaced by the fewest parts that fit in memory.

    Each number of parts that divides a process's images of a step is tried on the first images, until one fits in all
    processes. Task, engine and recipe then are as if it had been set by hand; the run's folder gets that recipe.
    """
    settings = recipe.train
    if settings.accumulate != "auto" or sum(data.counts) < settings.batch_size:  # the latter is an error of its own
        return recipe
    share = settings.batch_size // engine.accelerator.num_processes
    before = {name: value.detach().to("cpu", copy=True) for name, value in task.state_dict().items()}
    for parts in (number for number in range(1, share + 1) if share % number == 0):
        engine.settings = replace(settings, accumulate=parts)
        fits = not engine.any(not _fits(task, data, recipe, engine, shared, complete))
        task.zero_grad(set_to_none=True)
        task.load_state_dict(before)
        release_memory()
        if fits:
            break
    else:
        device, tried = engine.accelerator.device, _tried(engine.settings, engine)
        raise UserError(f"train.accumulate=auto: the memory of {device} is full with {tried}")
    log.info(
        "train.accumulate=auto: %d images of a step fit at once, so train.accumulate=%d", engine.micro_batch, parts
    )
    recipe = replace(recipe, train=engine.settings)
    if engine.accelerator.is_main_process:
        recipes.save(recipe, recipe.out)
    return recipe


def _fits(
    task: nn.Module, data: Data, recipe: Recipe, engine: Engine, shared: Shared | None, complete: Complete | None
) -> bool:
    """Return whether two steps of one micro-batch fit, the second beside the optimizer's state."""
    plan = Batches(tuple(data.counts), engine.micro_batch, recipe.seed, recipe.train.window)
    try:
        optimizer = bind(recipe.optimizer, OPTIMIZERS, "optimizer", context=("model",))(task)
        copies = (recipe.train.ema is not None) + (engine.accelerator.num_processes > 1)  # DDP's buckets of gradients
        held = [p.detach().clone() for p in task.parameters() if p.requires_grad for _ in range(copies)]
        for places in plan.between(0, 1):
            for _ in range(2):
                batch = to_device(fill(data, places), engine.accelerator.device)
                batch = batch if complete is None else complete(batch)
                batch["whole"] = {} if shared is None else shared(batch)
                with engine.autocast():
                    loss = task({**batch, "epoch": 0.0, "progress": 0.0})["loss"]
                loss.backward()
                optimizer.step()
        del held
    except RuntimeError as error:
        if not _is_full(error):
            raise
        return False
    return True


def _is_full(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _tried(settings: Train, engine: Engine) -> str:
    """Return what does not fit, with the values of the settings that decide, and the ways out."""
    share, precision = settings.batch_size // engine.accelerator.num_processes, settings.precision
    more = next((parts for parts in range(settings.parts + 1, share + 1) if share % parts == 0), None)
    ways = [f"set train.accumulate={more} or train.batch_size=auto, which leave a step's images the same"] * bool(more)
    ways += ["set train.precision=bf16"] * (precision == "fp32")
    ways = ways or ["choose a smaller student, or a larger device"]
    return (
        f"{engine.micro_batch} images at once (train.batch_size={settings.batch_size}, "
        f"train.accumulate={settings.accumulate}, train.precision={precision}); {'; or '.join(ways)}"
    )
