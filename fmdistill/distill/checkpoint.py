"""Checkpoints: a folder of safetensors and JSON that appears whole, and is all that an exact resume needs."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from fmdistill.files import write_whole
from fmdistill.registry import UserError

KEEP = 2  # newest checkpoints of a run


def save(run: Path, step: int, task: nn.Module, optimizer: torch.optim.Optimizer, order: str) -> Path:
    """Write `run`/checkpoints/step-NNNNNNNN and drop all but the newest; return its path. `order` names the data."""
    folder = run / "checkpoints"
    final, part = folder / f"step-{step:08d}", folder / f".step-{step:08d}.{os.getpid()}.part"
    part.mkdir(parents=True)
    save_state(task.state_dict(), part / "task.safetensors")
    save_state(_flat(optimizer), part / "optimizer.safetensors")
    write_whole(part / "state.json", json.dumps({"step": step, "order": order}))
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    for old in _steps(run)[:-KEEP]:
        shutil.rmtree(old)
    return final


def resume(run: Path, task: nn.Module, optimizer: torch.optim.Optimizer, order: str) -> int:
    """Load the newest checkpoint of `run` into task and optimizer; return its step, 0 where there is none.

    UserError where it cannot be read, or was trained on other images, so that its step would mean another batch.
    """
    for part in (run / "checkpoints").glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)  # another process of this run may be removing it too
    found = _steps(run)
    if not found:
        return 0
    try:
        task.load_state_dict(load_file(found[-1] / "task.safetensors"))
        _restore(optimizer, load_file(found[-1] / "optimizer.safetensors"))
        state = json.loads((found[-1] / "state.json").read_text())
        step, trained_on = int(state["step"]), state["order"]
    except (SafetensorError, RuntimeError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{found[-1]}: cannot resume from it ({reason}); delete this folder to use an earlier one"
        ) from None
    if trained_on != order:
        raise UserError(
            f"{found[-1]}: the training images have changed since, so the order of samples is another; "
            f"give the images that the run began with, or choose another out=FOLDER"
        )
    return step


def exists(run: Path) -> bool:
    """Return whether the run has a checkpoint."""
    return bool(_steps(run))


def newest(run: Path) -> Path:
    """Return the newest checkpoint's folder. UserError where there is none."""
    found = _steps(run)
    if not found:
        raise UserError(f"{run}: keeps no checkpoint, so nothing of its objective; train it anew")
    return found[-1]


def save_state(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors to `path` as safetensors, whole or not at all."""
    # Not save_file: where the disk is full it raises no OSError.
    write_whole(path, to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}))


def _steps(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step-*") if (path / "state.json").is_file())


def _flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(value) for index, s in state.items() for name, value in s.items()}


def _restore(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in flat.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
